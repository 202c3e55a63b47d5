"""``adversary.apgd``, ``adversary.fab`` and the others of the official AutoAttack, whose settings
people change one by one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ironmoe.attacks.aliases.own import aliases_of, own_arguments
from ironmoe.attacks.aliases.translated import with_own_names, without_checked
from ironmoe.attacks.attack import Attack
from ironmoe.attacks.methods.apgd import APGD
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.square import Square


class PartOf(NamedTuple):
    """An attack of the official object.

    kind: its class here
    settings: argument → the stages that it is for, of those in ``attacks_to_run``
    """

    kind: type[Attack]
    settings: Mapping[str, tuple[str, ...]]


APGDS = ("apgd-ce", "apgd-dlr")
BOTH_FABS = ("fab", "fab-t")
PARTS: Mapping[str, PartOf] = {
    "apgd": PartOf(APGD, dict.fromkeys(("steps", "restarts", "eot", "rho", "three_radii"), APGDS)),
    "apgd_targeted": PartOf(
        APGD,
        dict.fromkeys(("steps", "restarts", "eot", "rho", "three_radii", "targets"), ("apgd-t",)),
    ),
    # The official targeted FAB takes one attempt at each target, whatever ``n_restarts`` says.
    "fab": PartOf(
        FAB,
        {"restarts": ("fab",), "targets": ("fab-t",)}
        | dict.fromkeys(("steps", "alpha_max", "eta", "beta"), BOTH_FABS),
    ),
    "square": PartOf(Square, dict.fromkeys(("steps", "p_init", "restarts"), ("square",))),
}


class HasParts(ABC):
    """The official attributes of an AutoAttack."""

    stage_settings: dict[str, dict[str, Any]]
    """Stage → the arguments that differ from those of the version."""

    @abstractmethod
    def stage(self, name: str) -> Attack:
        """A new attack as the stage of this name is made."""

    @property
    def apgd(self) -> "Part":
        """The settings of "apgd-ce" and "apgd-dlr"."""
        return Part(self, "apgd")

    @property
    def apgd_targeted(self) -> "Part":
        """The settings of "apgd-t"."""
        return Part(self, "apgd_targeted")

    @property
    def fab(self) -> "Part":
        """The settings of "fab" and "fab-t"; ``n_restarts`` is for "fab" alone."""
        return Part(self, "fab")

    @property
    def square(self) -> "Part":
        """The settings of "square"."""
        return Part(self, "square")


class Part:
    """Settings of one attack of an AutoAttack, under the official names or those here.

    What is set holds for the stages that are made from now on: the AutoAttack makes its stages anew
    where a setting has changed.
    """

    def __init__(self, adversary: HasParts, name: str) -> None:
        vars(self).update(_adversary=adversary, _name=name, _part=PARTS[name])

    def __setattr__(self, name: str, value: Any) -> None:
        kind = self._part.kind
        given = without_checked(kind, with_own_names(kind, {name: value}))
        for own, here in given.items():
            self._set(name, own, here)

    def __getattr__(self, name: str) -> Any:
        own = next(iter(with_own_names(self._part.kind, {name: 2})), name)
        if own not in self._part.settings:
            raise self._unknown(name)
        return getattr(self._adversary.stage(self._part.settings[own][0]), own)

    def perturb(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``perturb`` of the attack by itself: of "apgd" that on the cross-entropy, of "fab" the
        untargeted one."""
        first = next(iter(self._part.settings.values()))[0]
        return self._adversary.stage(first).perturb(x, y)

    def __dir__(self) -> list[str]:
        return self._known()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._part.settings)
        return f"AutoAttack.{self._name}({values})"

    def _set(self, name: str, own: str, value: Any) -> None:
        """ValueError, TypeError: the attack does not take the value; nothing has changed then."""
        if own not in self._part.settings:
            raise self._unknown(name)
        settings = self._adversary.stage_settings
        before = {stage: dict(settings.get(stage, {})) for stage in self._part.settings[own]}
        for stage in before:
            settings[stage] = before[stage] | {own: value}
        try:
            for stage in before:
                self._adversary.stage(stage)
        except (TypeError, ValueError):
            settings.update(before)
            raise

    def _known(self) -> list[str]:
        """All names that can be set, the official ones first."""
        own = self._part.settings
        foreign = [
            name
            for name, alias in aliases_of(self._part.kind).items()
            if isinstance(alias, str) and alias in own
        ]
        return [*foreign, *own]

    def _unknown(self, name: str) -> AttributeError:
        everywhere = name in own_arguments(self._part.kind)
        advice = (
            f": give {name}= to AutoAttack, for all of its attacks"
            if everywhere and name in own_arguments(Attack)
            else ""
        )
        return AttributeError(
            f"{self._name} must be set by one of {', '.join(self._known())}, got {name}{advice}"
        )
