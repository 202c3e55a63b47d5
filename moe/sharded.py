"""Models whose weights are shared out over processes, by FSDP2 or another user of DTensor."""

import re
import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes have a part of the weights, so that each pass is one of all of them.
    FSDP2 may hold the weights of its outermost module as plain ones for a while."""
    return bool(fsdp_modules(model)) or any(map(_is_dtensor, model.parameters()))


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` has taken."""
    fsdp_module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return [module for module in model.modules() if isinstance(module, fsdp_module)]


def give_back_gathered(model: nn.Module) -> None:
    """Let the model's parameters be the sharded ones. FSDP2 keeps those of its outermost module
    gathered after a pass without gradients. What is written to the sharded ones is not seen by the
    next pass then, and what is written to the gathered ones is lost."""
    for module in fsdp_modules(model):
        module.reshard()


def printed_without_fsdp(model: nn.Module) -> str:
    """What the model prints where ``fully_shard`` has not changed the names of its classes."""
    text = repr(model)
    for kind in {type(module) for module in fsdp_modules(model)}:
        _, before = kind.__bases__
        text = re.sub(rf"\b{kind.__name__}\(", f"{before.__name__}(", text)
    return text


def local_box(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """Which part of a tensor this process holds: (start, stop) along each axis. A plain tensor is
    held whole."""
    if not _is_dtensor(tensor):
        return tuple((0, size) for size in tensor.shape)
    sharded: Any = tensor
    (chunk,) = sharded.__create_chunk_list__()  # the protocol by which torch's DCP asks
    return tuple((i, i + size) for i, size in zip(chunk.offsets, chunk.sizes, strict=True))


def local_values(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, as a view without gradients."""
    detached: Any = tensor.detach()
    return detached.to_local() if _is_dtensor(tensor) else detached


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, which the processes that hold it must gather together."""
    detached: Any = tensor.detach()
    return detached.full_tensor() if _is_dtensor(tensor) else detached


def _is_dtensor(tensor: Tensor) -> bool:
    # whoever shards has imported it; the import takes a second
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, dtensor)
