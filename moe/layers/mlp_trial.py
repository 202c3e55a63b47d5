"""What a block does between the two layers of its MLP, seen by running it once."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Calls(NamedTuple):
    """What a block called from the first part of its MLP to the last: names in order, what went in,
    and what came out."""

    names: list[str]
    x: Tensor | None
    y: Tensor | None


class _Function(nn.Module):
    """A function as a module, whose calls hooks can see."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@torch.no_grad()
def calls_within(block: nn.Module, parts: dict[str, Any], inputs: list[Tensor]) -> Calls:
    """Run the block in eval mode; it is left as it was.

    Args:
        parts: name → module or function of each part of the MLP, children of the block.
        inputs: what the block is called with.
    """
    first, *_, last = parts
    names: list[str] = []
    seen: dict[str, Tensor] = {}

    with ExitStack() as stack:
        for name, part in parts.items():
            if not isinstance(part, nn.Module):
                stack.enter_context(_as_module(block, name, part))
        stack.enter_context(in_eval(block))

        def note(name: str) -> Callable[..., None]:
            return lambda *_: names.append(name)

        for name, module in block.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(note(name)).remove)

        def note_input(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen["x"] = arguments[0]

        def note_output(_: nn.Module, __: Any, y: Tensor) -> None:
            seen["y"] = y

        block_parts = block.get_submodule(first), block.get_submodule(last)
        stack.callback(block_parts[0].register_forward_pre_hook(note_input).remove)
        stack.callback(block_parts[1].register_forward_hook(note_output).remove)
        block(*inputs)

    if not {first, last} <= set(names):
        return Calls([], None, None)
    end = len(names) - names[::-1].index(last)
    inside = [
        name
        for name in names[names.index(first) : end]
        # not what an activation calls itself
        if name in parts or name.split(".")[0] not in parts
    ]
    return Calls(inside, seen["x"], seen["y"])


@contextmanager
def _as_module(block: nn.Module, name: str, function: Any) -> Iterator[None]:
    """A function that is an attribute of the block, as a child of it."""
    own = vars(block).pop(name, None)
    setattr(block, name, _Function(function))
    try:
        yield
    finally:
        delattr(block, name)
        if own is not None:
            setattr(block, name, own)


@contextmanager
def in_eval(block: nn.Module) -> Iterator[None]:
    """Without dropout, and without counts that change."""
    training = {module: module.training for module in block.modules()}
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
