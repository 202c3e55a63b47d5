"""The arguments of ``evaluate``: names for attacks, checks, and the stages of each attack."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.job import Stage


def with_names(attacks: Mapping[str, Attack] | Sequence[Attack]) -> Mapping[str, Attack]:
    """Name → attack. A list of attacks is named by what they print, and by a number where that is
    the same."""
    if isinstance(attacks, Mapping):
        return attacks
    if not isinstance(attacks, Sequence):
        raise TypeError(
            f"attacks must be name → attack, or a list of attacks, got {type(attacks).__name__}"
        )

    named: dict[str, Attack] = {}
    for attack in attacks:
        name = ", ".join(filter(None, (repr(attack), attack.search)))
        alike = sum(known == name or known.startswith(f"{name} (") for known in named)
        named[f"{name} ({alike + 1})" if alike else name] = attack
    return named


def check_attacks(model: Model, attacks: Mapping[str, Attack], batch_size: int) -> None:
    """ValueError, TypeError: attacks that cannot be evaluated together on this model."""
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise TypeError(f"attacks[{name!r}] must be an attack, got {type(attack).__name__}")
        if attack.model is not model:
            raise ValueError(
                f"attacks[{name!r}] must be made for the model that is evaluated, got one for "
                "another model"
            )
        if isinstance(attack.eps, Tensor) and attack.eps.ndim:
            raise ValueError(f"attacks[{name!r}] must have a single eps, got one an example")

    bounds = {name: attack.bounds for name, attack in attacks.items()}
    if len(set(bounds.values())) > 1:
        raise ValueError(f"attacks must have the same bounds, got {bounds}")


def chain_of(attack: Attack, eps: Sequence[float] | None) -> list[Stage]:
    """The stages of an attack at all radii, the smallest first."""
    if eps is not None and not isinstance(eps, Sequence | Tensor):
        raise TypeError(f"eps must be a list of radii, or None for each attack's own, got {eps!r}")
    radii = [float(attack.eps)] if eps is None else sorted({float(e) for e in eps})
    if not radii or not all(radius >= 0 for radius in radii):
        raise ValueError(f"eps must hold at least one radius, none below 0, got {eps}")
    return [Stage(stage, radius) for radius in radii for stage in attack.stages]
