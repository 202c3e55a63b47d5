"""The tensors of a model by the names that they have without wrappers, sharded as they are."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from ironmoe.kernels.checks import check_module
from ironmoe.moe.checkpoints.errors import CheckpointError, some_names
from ironmoe.moe.sharded import give_back_gathered


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint has, as views.

    TypeError, ValueError: the model keeps something else in its state, or has no memory.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    check_module(model)
    give_back_gathered(model)
    state = get_model_state_dict(model)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"model must have a state of tensors alone, got {kind} as {name}")
        if value.is_meta:
            raise ValueError(
                f"model must have memory, got {name} on the meta device: call model.to_empty(…)"
            )
    return cast("dict[str, Tensor]", state)


def set_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """To be called when the views of ``model_tensors`` have got new values: what a module does when
    it loads a state, it does now."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, dict(tensors))


def require_names(expected: set[str], found: set[str], where: object) -> None:
    """CheckpointError unless a checkpoint has the model's tensors, every one of them and no
    other."""
    if expected != found:
        raise CheckpointError(
            f"{where}: found the tensors of another model; missing: "
            f"{some_names(expected - found)}; not in the model: {some_names(found - expected)}"
        )
