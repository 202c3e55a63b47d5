"""The attacks of ``ironmoe attack``: by name, with what each takes from the command line."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import typer
from torch import nn

from ironmoe.attacks import FGSM, MIFGSM, PGD
from ironmoe.attacks.attack import Attack
from ironmoe.attacks.autoattack import AutoAttack
from ironmoe.attacks.balls.ball import NORMS
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.methods.apgd import APGD
from ironmoe.attacks.methods.carlini_wagner import CW
from ironmoe.attacks.methods.deepfool import DeepFool
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.square import Square
from ironmoe.attacks.routing.modes import (
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingDivergence,
    Softened,
    StraightThrough,
)
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


class SuiteError(typer.BadParameter):
    """Attacks that cannot be made as asked; the message says why and what is possible."""


class Entry(NamedTuple):
    """kind: the class; takes: options of the command line that apply; given: arguments that make it
    the attack of this name."""

    kind: type[Attack]
    takes: tuple[str, ...] = ()
    given: dict[str, Any] = {}  # noqa: RUF012  # never changed


ATTACKS = {
    "fgsm": Entry(FGSM),
    "pgd": Entry(PGD, ("steps", "restarts", "alpha"), {"steps": 40, "restarts": 2}),
    "mifgsm": Entry(MIFGSM, ("steps", "alpha")),
    "apgd-ce": Entry(APGD, ("steps", "restarts"), {"loss": "ce"}),
    "apgd-dlr": Entry(APGD, ("steps", "restarts"), {"loss": "dlr"}),
    "apgd-t": Entry(APGD, ("steps", "restarts"), {"loss": "dlr", "targets": 9}),
    "fab": Entry(FAB, ("steps", "restarts"), {"targets": 0}),
    "fab-t": Entry(FAB, ("steps", "restarts"), {"targets": 9}),
    "square": Entry(Square, ("steps", "restarts")),
    "deepfool": Entry(DeepFool, ("steps",)),
    "cw": Entry(CW, ("steps",)),
    "autoattack": Entry(AutoAttack),
    "autoattack-plus": Entry(AutoAttack, (), {"version": "plus"}),
    "autoattack-rand": Entry(AutoAttack, (), {"version": "rand"}),
}


class Suite(NamedTuple):
    """Which attacks, and how. eps and alpha in units of 1/255 of the pixel range; None is an
    attack's own default.

    dtype: of the search; routing: what the search does to routing. Both by their names above.
    """

    names: tuple[str, ...] = ("pgd",)
    norm: str = "Linf"
    eps_255: tuple[float, ...] = (2, 4, 8, 12, 16, 24)
    steps: int | None = None
    restarts: int | None = None
    alpha_255: float | None = None
    eot: int | None = None
    seed: int = 0
    dtype: str = "float32"
    routing: str = "free"

    def check(self) -> None:
        """SuiteError: what is wrong whatever the model."""
        for option, value, known in (
            ("norm", self.norm, NORMS),
            ("dtype", self.dtype, DTYPES),
            ("routing", self.routing, ROUTING),
        ):
            if value not in known:
                raise SuiteError(f"--{option} must be one of {', '.join(known)}, got {value!r}")
        for name in self.names:
            if name not in ATTACKS:
                raise SuiteError(
                    f"--attack must be names among {', '.join(ATTACKS)}, separated by commas, got "
                    f"{name!r}"
                )
            norms = ATTACKS[name].kind.norms
            if self.norm not in norms:
                raise SuiteError(
                    f"--norm must be {' or '.join(norms)} for --attack {name}, got {self.norm!r}"
                )
        for option, value in self._given.items():
            if value is not None and not any(option in ATTACKS[name].takes for name in self.names):
                takers = [name for name, entry in ATTACKS.items() if option in entry.takes]
                raise SuiteError(
                    f"--{option} applies to {', '.join(takers)}, not to --attack "
                    f"{','.join(self.names)}"
                )

    def make(self, model: nn.Module) -> dict[str, Attack]:
        """name → attack, each with the largest eps; ``evaluate`` goes through all of them.
        SuiteError: not for this model."""
        self.check()
        if self.routing != "free" and not routing_sites(model):
            raise SuiteError(
                f"--routing {self.routing} needs a model with experts, and {type(model).__name__} "
                "has none"
            )
        common: dict[str, Any] = {
            "eps": self.eps_255[-1] / 255,
            "norm": self.norm,
            "seed": self.seed,
            "attack_dtype": DTYPES[self.dtype],
            "routing": None if self.routing == "free" else ROUTING[self.routing](),
        }
        if self.eot is not None:
            common["eot"] = self.eot
        attacks = {}
        for name in self.names:
            entry = ATTACKS[name]
            given = {
                option: value
                for option, value in self._given.items()
                if value is not None and option in entry.takes
            }
            try:
                attacks[name] = entry.kind(model, **(common | entry.given | given))
            except ValueError as error:
                raise SuiteError(f"--attack {name}: {error}") from error
        return attacks

    @property
    def alpha(self) -> float | None:
        return None if self.alpha_255 is None else self.alpha_255 / 255

    @property
    def pgd_steps(self) -> int:
        """Of the suite's PGD, or of PGD by default."""
        own: int = ATTACKS["pgd"].given["steps"]
        return self.steps if "pgd" in self.names and self.steps is not None else own

    @property
    def _given(self) -> dict[str, Any]:
        return {"steps": self.steps, "restarts": self.restarts, "alpha": self.alpha}
