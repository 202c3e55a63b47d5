"""Models whose weights are shared out over processes, by FSDP2 or another user of DTensor."""

import re
import sys
from typing import Any, cast

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether other processes have a part of the weights, so that each pass is one of all of them.
    FSDP2 may hold the weights of its outermost module as plain ones for a while."""
    # whoever shards has imported it; the import takes a second
    dtensor = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return bool(fsdp_modules(model)) or any(
        isinstance(parameter, dtensor) for parameter in model.parameters()
    )


def local_numbers(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, as a plain one on the same memory; any other
    tensor itself."""
    return cast("Any", tensor).to_local() if hasattr(tensor, "to_local") else tensor


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
