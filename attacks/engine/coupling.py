"""Models whose images influence each other: which images must stay together, and which attacks
cannot take them."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ironmoe.attacks.engine.search import Search
from ironmoe.moe.routers.groups import Grouped, images_in_group


def images_coupled(model: Any) -> bool:
    """Whether a layer lets one image's tokens take another's places: a capacity, Expert Choice.

    Without such a layer, and without batch statistics, an image's logits do not depend on the
    batch: images may then come and go.
    """
    return isinstance(model, nn.Module) and any(
        isinstance(module, Grouped) for module in model.modules()
    )


def images_per_unit(model: Any, batch_size: int) -> int:
    """How many neighbouring images must be attacked together: the least common multiple of the
    groups of all layers. It is the whole batch where a layer's group is the batch, or is a number
    of tokens that need not be whole images."""
    if not images_coupled(model):
        return 1
    return images_in_group(model) or batch_size


def check_groups(attacks: Iterable[Search], unit_size: int) -> None:
    """ValueError: an attack that cannot be right on units of several images."""
    for attack in attacks:
        if unit_size == 1 or attack.takes_groups:
            continue

        if attack.coupled_by_model:
            why = (
                "a model whose images influence each other (a capacity or Expert Choice, groups of "
                f"{unit_size}); use FGSM, PGD, MIFGSM or APGD, or a dropless model"
            )
        else:
            why = (
                f"{attack.attacked_model.routing}, a loss that all images share; use FGSM, PGD, "
                "MIFGSM or APGD, or another routing mode"
            )
        raise ValueError(
            f"{type(attack).__name__} accepts or rejects each image's step by itself, which is "
            f"wrong for {why}"
        )


def layer_with_batch_statistics(model: Any) -> str | None:
    """The name of the first batch norm that keeps no running statistics, so that it looks at its
    batch in eval mode, too; None without one."""
    if not isinstance(model, nn.Module):
        return None
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            return name
    return None
