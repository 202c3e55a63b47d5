"""Attacks as they were made: every setting that the command line left to them, in numbers and in
words."""

from typing import Any, NamedTuple

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.registry import named_attacks
from ironmoe.bench.attack.suite import Suite
from ironmoe.bench.common.radii import exact


class Part(NamedTuple):
    """An attack, or one of those that an ensemble runs.

    steps:       None if the attack takes no steps
    restarts:    None if the attack makes no restarts
    targets:     how many classes are targets in turn, 0 without targets
    eot:         how many answers of the model each answer is the mean of
    max_queries: how often the longest attempt asks the model
    """

    name: str
    steps: int | None
    restarts: int | None
    targets: int
    eot: int
    max_queries: int

    def as_dict(self) -> dict[str, Any]:
        """For report.json, which calls queries questions, as the reports do."""
        numbers = self._asdict()
        return numbers | {"questions": numbers.pop("max_queries")}


def parts_of(name: str, attack: Attack) -> tuple[Part, ...]:
    """The attack as one part, or the parts of an ensemble."""
    stages = attack.stages
    return tuple(
        Part(
            name=name if len(stages) == 1 else stage.name,
            steps=getattr(stage, "steps", None),
            restarts=vars(stage).get("restarts"),  # None unless the attack itself sets it
            targets=stage.targets,
            eot=stage.eot,
            max_queries=stage.max_queries,
        )
        for stage in stages
    )


def describe(suite: Suite, parts: dict[str, tuple[Part, ...]]) -> str:
    """One line for people."""
    line = ", ".join(_described(name, suite, parts[name]) for name in suite.names)
    if suite.dtype != "float32":
        line += f", search in {suite.dtype}"
    return line if suite.routing == "free" else f"{line}, search with routing {suite.routing}"


def _described(name: str, suite: Suite, parts: tuple[Part, ...]) -> str:
    if len(parts) > 1:
        return f"{name} ({'; '.join(f'{part.name}: {_settings(part)}' for part in parts)})"
    alpha = suite.alpha_255 is not None and "alpha" in named_attacks()[name].takes
    length = f", alpha {exact(suite.alpha_255 or 0)}/255" if alpha else ""
    return f"{name} ({_settings(parts[0])}{length})"


def _settings(part: Part) -> str:
    known: dict[str, Any] = {
        "steps": part.steps,
        "restarts": part.restarts,
        "targets": part.targets or None,
    }
    if part.steps is None or part.max_queries > part.steps + 1:  # Square's start is one more
        known["questions"] = part.max_queries
    shown = [f"{key} {value}" for key, value in known.items() if value is not None]
    return ", ".join(shown if part.eot == 1 else [*shown, f"each answer the mean of {part.eot}"])
