"""Experts take the place of an MLP: a trial, before anything changes, whether what lies around
computes the same with a stand-in there.

The stand-in is one dense MLP with the weights that each expert will have, so what differs is the
place and not the router.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.moe.adapters.places import AddResidual
from ironmoe.moe.layers.dense_mlp import DenseMlp
from ironmoe.moe.layers.mlp_layouts import (
    Layout,
    channels_first,
    layout_of,
    num_inputs,
    parts_of,
    run,
    takes_residual,
)
from ironmoe.moe.layers.mlp_trial import in_eval

SCALES = {1: 1.0, 50: 10.0}
"""How many tokens → their standard deviation. By 4 of standard deviation 1 an MLP was known."""


class _StandIn(nn.Module):
    """A dense MLP for tokens (…, D), or for images (B, D, H, W)."""

    def __init__(self, mlp: DenseMlp, is_channels_first: bool) -> None:
        super().__init__()
        self.mlp = mlp
        self.is_channels_first = is_channels_first

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.movedim(1, -1)).movedim(-1, 1) if self.is_channels_first else self.mlp(x)


@torch.no_grad()
def check_in_place(model: nn.Module, path: str, mlp: DenseMlp) -> None:
    """Compare an MLP with its reading on other numbers of tokens, and its block with the block that
    has a stand-in, on random input in eval mode.

    A block that cannot be run on a tensor alone, that is random or whose outputs are not finite is
    not looked at, and nothing is on the meta device.

    Raises:
        ValueError: they differ; the message names the MLP. Nothing was changed.
    """
    module = model.get_submodule(path)
    layout = layout_of(module)
    if layout is None or mlp.w_in.is_meta:
        return
    label = f"{path} ({type(module).__name__})" if path else type(module).__name__
    with torch.random.fork_rng(devices=[]):
        if layout.example is None:
            _check_counts(module, layout, mlp, label)
        if layout.parts:
            block, changed = module, _with_stand_in_for_parts(module, layout, mlp)
        elif path:
            parent, _, name = path.rpartition(".")
            block = model.get_submodule(parent)
            stand_in = _StandIn(mlp, channels_first(module, layout))
            changed = _copy_with(block, {name: stand_in})
        else:
            return
        _check_block(block, changed, mlp, label)


def _check_counts(module: nn.Module, layout: Layout, mlp: DenseMlp, label: str) -> None:
    for count, scale in SCALES.items():
        x = scale * _random((1, count, mlp.w_in.shape[1]), mlp.w_in)
        with in_eval(module):
            theirs = run(module, layout, x)
        if not _are_near([theirs], [mlp(x)]):
            raise ValueError(
                f"{label} must compute what its layers and {mlp.activation} say for any number of "
                "tokens and any values, as experts do, got something else for a number of tokens "
                f"of {count} and a standard deviation of {scale:g}"
            )


def _check_block(block: nn.Module, changed: nn.Module, mlp: DenseMlp, label: str) -> None:
    before = _copy_with(block, {})  # which leaves torch's fused path, too
    rule = (
        f"{label} must be used by its block, {type(block).__name__}, for what the MLP returns "
        "alone, because experts take its place"
    )
    dim = mlp.w_in.shape[1]
    for shape in ((1, 9, dim), (1, 6, 6, dim), (1, dim, 6, 6)):
        x = _random(shape, mlp.w_in)
        try:
            wanted, again = _outputs(before, x), _outputs(before, x)
        except Exception:  # it wants something else, or more than one tensor
            continue
        if not wanted or not _are_near(wanted, again):
            continue
        try:
            found = _outputs(changed, x)
        except Exception as error:
            raise ValueError(f"{rule}, got a block that fails with them: {error}") from error
        if not _are_near(wanted, found):
            raise ValueError(f"{rule}, got a block that computes something else with them")
        return


def _with_stand_in_for_parts(block: nn.Module, layout: Layout, mlp: DenseMlp) -> nn.Module:
    parts = parts_of(block, layout)
    first, *between, last = parts
    changes: dict[str, nn.Module] = {first: _StandIn(mlp, channels_first(block, layout))}
    changes |= {name: nn.Identity() for name in between}
    changes[last] = AddResidual() if takes_residual(parts[last]) else nn.Identity()
    return _copy_with(block, changes)


def _copy_with(block: nn.Module, changes: Mapping[str, nn.Module]) -> nn.Module:
    """A block with the same children but these; the block itself stays as it is."""
    made = copy.copy(block)
    made._modules = block._modules.copy()
    if hasattr(made, "activation_relu_or_gelu"):  # the fused path reads weights by name
        made.activation_relu_or_gelu = 0  # type: ignore[assignment]
    for name, module in changes.items():
        vars(made).pop(name, None)  # a function
        setattr(made, name, module)
    return made


def _outputs(block: nn.Module, x: Tensor) -> list[Tensor]:
    with in_eval(block):
        return list(_tensors(block(*[x.clone() for _ in range(num_inputs(block))])))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for each in output:
            yield from _tensors(each)


def _are_near(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether they are the same but for rounding; so are two without finite numbers."""
    return len(wanted) == len(found) and all(
        one.shape == other.shape and _is_near(one, other)
        for one, other in zip(wanted, found, strict=True)
    )


def _is_near(wanted: Tensor, found: Tensor) -> bool:
    if wanted.is_meta or not wanted.isfinite().all():
        return True
    tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max().item()
    return torch.allclose(wanted, found, rtol=0, atol=tolerance)


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), device="cpu").to(like)
