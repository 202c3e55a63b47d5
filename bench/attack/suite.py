"""The attacks of ``ironmoe attack``: from names and options to attacks on a model.

Everything that depends on an attack or a norm is asked of their registers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.ball import NORMS, Ball
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.registry import named_attacks
from ironmoe.attacks.routing.modes import (
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingDivergence,
    Softened,
    StraightThrough,
)
from ironmoe.bench.common.choices import did_you_mean
from ironmoe.bench.common.radii import from_255
from ironmoe.moe.routing.routed_layers import routing_sites

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUTING: dict[str, Callable[[], RoutingMode]] = {
    "free": RoutingMode,
    "frozen": FrozenRouting,
    "gates-only": GatesOnly,
    "experts-only": ExpertsOnly,
    "straight-through": StraightThrough,
    "softened": Softened,
    "diverge": RoutingDivergence,
}


LATER = ("levels", "queries")  # settings that earlier runs did not know
ROUNDING = 1e-6  # a change of images that is not worth a word


class SuiteError(typer.BadParameter):
    """The attacks cannot be made as asked; the message says why and what is possible."""


class Suite(NamedTuple):
    """Which attacks to run, and how. eps and alpha are in units of 1/255 of the pixel range; None
    is an attack's own default.

    names:   of registered attacks
    queries: in place of steps, for attacks whose steps are single queries, such as Square
    dtype:   of the search, a name in ``DTYPES``
    routing: what the search does to routing, a name in ``ROUTING``
    levels:  how many values a pixel of an adversarial image may have, evenly spaced; None: any
    """

    names: tuple[str, ...] = ("pgd",)
    norm: str = "Linf"
    eps_255: tuple[float, ...] = Ball.usual_radii
    steps: int | None = None
    queries: int | None = None
    restarts: int | None = None
    alpha_255: float | None = None
    eot: int | None = None
    seed: int = 0
    dtype: str = "float32"
    routing: str = "free"
    levels: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run; without what earlier runs did not know, if it is not
        asked for."""
        settings = self._asdict()
        return {key: value for key, value in settings.items() if key not in LATER or value}

    def check(self) -> None:
        """Find mistakes in the options that do not depend on the model.

        Raises:
            SuiteError: the message says what, and what is possible.
        """
        self._check_choices()
        self._check_names()
        self._check_options()

    def _check_choices(self) -> None:
        choices: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
            ("norm", self.norm, NORMS),
            ("dtype", self.dtype, DTYPES),
            ("routing", self.routing, ROUTING),
        )
        for option, value, known in choices:
            if value not in known:
                raise SuiteError(
                    f"--{option} must be one of {', '.join(known)}, got {value!r}"
                    f"{did_you_mean(value, known)}"
                )

    def _check_names(self) -> None:
        known = named_attacks()
        for name in self.names:
            if name not in known:
                raise SuiteError(
                    f"--attack must be names among {', '.join(known)}, separated by commas, got "
                    f"{name!r}{did_you_mean(name, known)}"
                )
            norms = known[name].kind.norms
            if self.norm not in norms:
                raise SuiteError(
                    f"--norm must be {' or '.join(norms)} for --attack {name}, got {self.norm!r}"
                )

    def _check_options(self) -> None:
        """Raise SuiteError if an option applies to none of the attacks."""
        for option in self._given:
            if not self._takers(option):
                takers = [name for name in named_attacks() if takes(name, option)]
                queries = option == "steps" and self._takers("queries")
                raise SuiteError(
                    f"--{option} applies to {', '.join(takers)}, not to --attack "
                    f"{','.join(self.names)}{', which takes --queries' if queries else ''}"
                )

    @property
    def notes(self) -> list[str]:
        """A sentence for each option that some of the attacks do not take."""
        sentences = []
        for option, value in self._given.items():
            others = [name for name in self.names if not takes(name, option)]
            if others:
                sentences.append(
                    f"--{option} {value:g} is for {' and '.join(self._takers(option))}; "
                    f"{' and '.join(others)} {'runs' if len(others) == 1 else 'run'} without it."
                )
        return sentences

    def _takers(self, option: str) -> list[str]:
        return [name for name in self.names if takes(name, option)]

    def make(self, model: nn.Module) -> dict[str, Attack]:
        """name → attack, each with the largest eps; ``evaluate`` goes through all of them.

        Raises:
            SuiteError: the attacks do not suit this model.
        """
        self.check()
        if self.routing != "free" and not routing_sites(model):
            raise SuiteError(
                f"--routing {self.routing} needs a model with experts, and {type(model).__name__} "
                "has none"
            )
        common: dict[str, Any] = {
            "eps": from_255(self.eps_255[-1]),
            "norm": self.norm,
            "seed": self.seed,
            "attack_dtype": DTYPES[self.dtype],
            "routing": None if self.routing == "free" else ROUTING[self.routing](),
        }
        common |= {
            option: value
            for option, value in (("eot", self.eot), ("levels", self.levels))
            if value is not None
        }

        known = named_attacks()
        attacks = {}
        for name in self.names:
            kind, _, settings = known[name]
            given = {
                ARGUMENTS.get(option, option): value
                for option, value in self._arguments.items()
                if takes(name, option)
            }
            try:
                attacks[name] = kind(model, **{**settings, **common, **given})
            except ValueError as error:
                raise SuiteError(f"--attack {name}: {error}") from error

        return attacks

    def on_grid(self, images: Tensor) -> tuple[Tensor, float]:
        """(the images (N, …) in [0, 1], rounded to ``levels`` where there are any; the largest
        change)."""
        if self.levels is None:
            return images, 0.0
        steps = self.levels - 1
        rounded = ((images.double() * steps).round() / steps).to(images.dtype)
        return rounded, float((rounded - images).abs().max()) if images.numel() else 0.0

    def rounding(self, change: float) -> str:
        """A sentence about images that were rounded by up to ``change``; empty if by nothing."""
        if change < ROUNDING:
            return ""
        return f"The images were rounded to {self.levels} levels first, by up to {change:.2g}."

    @property
    def alpha(self) -> float | None:
        return None if self.alpha_255 is None else from_255(self.alpha_255)

    @property
    def pgd_steps(self) -> int:
        """Steps of the suite's PGD, or those that PGD has by default."""
        if "pgd" in self.names and self.steps is not None:
            return self.steps
        usual: int = named_attacks()["pgd"].settings["steps"]
        return usual

    @property
    def _arguments(self) -> dict[str, Any]:
        """The options that the user gave and that not every attack takes, for constructors."""
        return self._given | ({} if self.alpha is None else {"alpha": self.alpha})

    @property
    def _given(self) -> dict[str, Any]:
        """The same, as the user gave them."""
        options = {
            "steps": self.steps,
            "queries": self.queries,
            "restarts": self.restarts,
            "alpha": self.alpha_255,
        }
        return {option: value for option, value in options.items() if value is not None}


ARGUMENTS = {"queries": "steps"}
"""Options whose argument in the constructor has another name."""


def takes(name: str, option: str) -> bool:
    """Whether an option applies to the attack of this name. Each step of some attacks is one query,
    so they need far more of them than others, and have an option of their own."""
    attack = named_attacks()[name]
    if "n_queries" in attack.kind.aliases:
        return option == "queries" or (option in attack.takes and option != "steps")
    return option in attack.takes
