"""The arguments of ``evaluate``: names for attacks, checks, and the stages of each attack."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.ball import ball_of
from ironmoe.attacks.balls.checked import shown, warn_of_unit
from ironmoe.attacks.engine.attacked_model import AttackedModel, Model
from ironmoe.attacks.engine.coupling import images_coupled
from ironmoe.attacks.engine.job import Stage
from ironmoe.attacks.engine.search import Search
from ironmoe.attacks.goals.goal import Goal

SHARED: Mapping[str, Callable[[Attack], Any]] = {
    "bounds": lambda attack: attack.bounds,
    "normalize": lambda attack: attack.attacked_model.normalize,
    "logits_fn": lambda attack: attack.attacked_model.logits_fn,
    "goal": lambda attack: attack.goal,
}
"""What must not differ between the attacks of one evaluation: it decides what the model sees, and
which images are right without any attack."""


def with_names(
    attacks: Mapping[str, Attack] | Sequence[Attack], search_model: Model | None = None
) -> Mapping[str, Attack]:
    """Name → attack. A list of attacks is named by what they print, by the model that they search
    on if it is another one, and by a number where that is the same."""
    if isinstance(attacks, Mapping):
        return attacks
    if not isinstance(attacks, Sequence):
        raise TypeError(
            f"attacks must be name → attack, or a list of attacks, got {type(attacks).__name__}"
        )

    source = None if search_model is None else f"search_model={name_of(search_model)}"
    named: dict[str, Attack] = {}
    for attack in attacks:
        name = ", ".join(filter(None, (repr(attack), attack.search, source)))
        alike = sum(known == name or known.startswith(f"{name} (") for known in named)
        named[f"{name} ({alike + 1})" if alike else name] = attack
    return named


def parts_by_name(attacks: Mapping[str, Attack]) -> dict[Search | None, str]:
    """Each attack, or each part of an ensemble → what people call it."""
    return {
        part: name if part is attack else part.name
        for name, attack in attacks.items()
        for part in attack.stages
    }


def name_of(model: Model) -> str:
    """How reports call a model: the name of its class, or of the function."""
    return getattr(model, "__qualname__", None) or type(model).__name__


def target_of(
    model: Model, search_model: Model | None, attacks: Mapping[str, Attack]
) -> AttackedModel | None:
    """The model whose predictions count, called as the attacks call theirs; None: it is theirs.

    Raises:
        ValueError: images influence each other in one of the models.
    """
    if search_model is None or search_model is model:
        return None
    for name, each in {"model": model, "search_model": search_model}.items():
        if images_coupled(each):
            raise ValueError(
                f"{name} must judge each image by itself in a transfer, got {name_of(each)}, whose "
                "images influence each other (a capacity or Expert Choice)"
            )
    attack = next(iter(attacks.values()))
    called = attack.attacked_model
    return AttackedModel(model, called.normalize, called.logits_fn, goal=attack.goal)


def check_attacks(
    model: Model,
    attacks: Mapping[str, Attack],
    batch_size: int,
    search_model: Model | None = None,
) -> None:
    """ValueError, TypeError: attacks that cannot be evaluated together on this model, or on the one
    that they are to search on."""
    if not attacks:
        raise ValueError("attacks must hold at least one attack, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise TypeError(f"attacks[{name!r}] must be an attack, got {type(attack).__name__}")
        if attack.model is not (model if search_model is None else search_model):
            wanted = (
                "the model that is evaluated, or for search_model"
                if search_model is None
                else "search_model"
            )
            raise ValueError(
                f"attacks[{name!r}] must be made for {wanted}, got one for another model"
            )


def check_shared(attacks: Mapping[str, Attack]) -> None:
    """ValueError: attacks that would see different models, or call other images right."""
    for what, of in SHARED.items():
        values = {name: of(stage) for name, attack in attacks.items() for stage in attack.stages}
        first, *others = values.values()
        if not all(_is_same(first, other) for other in others):
            got = {name: _told(value) for name, value in values.items()}
            raise ValueError(
                f"attacks must have the same {what}, since one clean prediction counts for all of "
                f"them, got {got}; evaluate them one after another"
            )


def _told(value: Any) -> Any:
    """How an error shows it: tensors by their shape."""
    is_pair = isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value)
    return tuple(map(shown, value)) if is_pair else value


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(_is_same(a, b) for a, b in pairs)
    if isinstance(one, Goal) and isinstance(other, Goal):
        mine, its = vars(one), vars(other)
        same_names = type(one) is type(other) and mine.keys() == its.keys()
        return same_names and all(_is_same(mine[name], its[name]) for name in mine)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    return bool(one == other)


def chain_of(attack: Attack, eps: Sequence[float] | None) -> list[Stage]:
    """The stages of an attack at all radii, the smallest first."""
    is_list = isinstance(eps, Sequence | Tensor) and all(_is_number(each) for each in eps)
    if eps is not None and not is_list:
        raise TypeError(
            f"eps must be a list of radii, such as [8 / 255], or None for each attack's own, got "
            f"{eps!r}"
        )
    radii = [attack.largest_eps] if eps is None else sorted({float(e) for e in eps})
    if not radii or not all(radius >= 0 for radius in radii):
        raise ValueError(f"eps must hold at least one radius, none below 0, got {eps}")
    if eps is not None:
        warn_of_unit(ball_of(attack.norm), radii[-1], attack.bounds)
    return [Stage(stage, radius) for radius in radii for stage in attack.stages]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)
