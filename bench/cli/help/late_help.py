"""Help texts that follow from registers: of attacks, norms, models, routing modes and others.

The registers import torch, which takes seconds. So a text has a place such as ``{norms}``, which is
filled in when somebody asks for the help of that command.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def with_late_help(params: Iterable[Any]) -> Iterator[None]:
    """Inside the block, the help of these options names what is registered at that moment."""
    written = {option: option.help for option in params if getattr(option, "help", None)}
    values = _values() if any("{" in text for text in written.values()) else {}
    try:
        for option, text in written.items():
            option.help = _filled(text, values)
        yield
    finally:
        for option, text in written.items():
            option.help = text


def _filled(text: str, values: dict[str, str]) -> str:
    for place, value in values.items():
        text = text.replace("{" + place + "}", value)
    return text


def _values() -> dict[str, str]:
    """place → text."""
    from ironmoe.attacks import registry  # its classes are registered by ``ironmoe.attacks``
    from ironmoe.attacks.balls.ball import NORMS
    from ironmoe.attacks.training import TRAINING_METHODS
    from ironmoe.bench.attack.suite import DTYPES, ROUTING, takes
    from ironmoe.bench.benchmarks.gpu.jobs import KINDS
    from ironmoe.bench.benchmarks.training.models import MODELS
    from ironmoe.bench.benchmarks.training.runs import VARIANTS
    from ironmoe.bench.common.radii import exact, usual_radii, usual_radius
    from ironmoe.bench.models.load import FORMS
    from ironmoe.bench.study.ladder.arms import LADDER
    from ironmoe.bench.study.ladder.training import TRAININGS
    from ironmoe.bench.study.measure.table import all_measurements, usual_measurements

    attacks = registry.named_attacks()
    full_precision, *lower_precision = (f"**{dtype}**" for dtype in DTYPES)

    def usual(setting: str) -> str:
        own = {name: attack.settings.get(setting) for name, attack in attacks.items()}
        return ", ".join(f"{value} for {name}" for name, value in own.items() if value is not None)

    takers = {
        f"takers_of_{option}": ", ".join(
            name for name, method in TRAINING_METHODS.items() if option in method.takes
        )
        for method in TRAINING_METHODS.values()
        for option in method.takes
    }
    attack_options = {
        "queries",
        *(option for attack in attacks.values() for option in attack.takes),
    }
    takers |= {
        f"attacks_with_{option}": ", ".join(name for name in attacks if takes(name, option))
        for option in attack_options
    }
    return takers | {
        "attacks": ", ".join(attacks),
        "norms": _one_of(NORMS),
        "training_methods": ", ".join(TRAINING_METHODS),
        "routing": _one_of(ROUTING),
        "search_dtypes": f"{full_precision}, or {' or '.join(lower_precision)}",
        "training_models": _one_of(MODELS),
        "training_variants": ", ".join(VARIANTS),
        "study_arms": ", ".join(LADDER),
        "study_trainings": ", ".join(TRAININGS),
        "study_measurements": ", ".join(all_measurements()),
        "study_optional": ", ".join(
            name for name in all_measurements() if name not in usual_measurements()
        ),
        "job_kinds": ", ".join(KINDS),
        "model_forms": FORMS,
        "usual_radii": "; ".join(f"{usual_radii(norm)} in {norm}" for norm in NORMS),
        "usual_training_radii": ", ".join(
            f"{exact(usual_radius(norm))} in {norm}" for norm in NORMS
        ),
        "usual_steps": usual("steps"),
        "usual_queries": str(inspect.signature(attacks["square"].kind).parameters["steps"].default),
        "usual_restarts": usual("restarts"),
        "usual_eot": usual("eot"),
    }


def _one_of(names: Iterable[str]) -> str:
    """ "**a**, **b** or **c**"."""
    *most, last = (f"**{name}**" for name in names)
    return f"{', '.join(most)} or {last}"
