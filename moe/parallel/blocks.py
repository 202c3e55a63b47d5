"""The blocks of a model, which FSDP2 shards one by one."""

from collections.abc import Iterator

from torch import nn


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model: what the outermost lists of modules hold that have several members. A
    Sequential is such a list if all its members are of one class; else it is a part of a block.
    A list of experts holds none, because an expert is not called in every process in every pass, as
    FSDP2 needs it."""
    for name, module in model.named_children():
        members = list(module.children())
        is_list = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len({type(member) for member in members}) == 1
        )
        if name == "experts":
            continue
        if is_list and len(members) > 1:
            yield from (member for member in members if any(True for _ in member.parameters()))
        else:
            yield from blocks(module)
