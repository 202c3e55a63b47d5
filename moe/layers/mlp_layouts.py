"""Where the two layers of a dense MLP lie in the modules of each library: known by their names."""

import inspect
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn


def _tokens(dim: int) -> tuple[int, ...]:
    return 1, 4, dim


def _image(dim: int) -> tuple[int, ...]:
    return 1, dim, 4, 4


class Layout(NamedTuple):
    """Names of the layers of an MLP, each an nn.Linear or a 1 × 1 convolution.

    first: one, or gate and up; second: the other layer.
    activation: what the forward calls where it calls a function in place of a module.
    parts: the children of a block that are its MLP, in the order in which the block calls them,
        where the MLP is no module of its own; an activation among them may be a function. Those
        that a block lacks are left out.
    example: D → the shape of an input of the block, for a block that calls the layers itself.
    """

    first: tuple[str, ...]
    second: str
    activation: str | None = None
    parts: tuple[str, ...] = ()
    example: Callable[[int], tuple[int, ...]] | None = None


LAYOUTS = (
    # ironmoe; timm Mlp, GluMlp and ConvMlp; transformers ViT, DeiT, BEiT, DINOv2, CLIP, Swin
    Layout(("fc1",), "fc2"),
    Layout(("fc1_g", "fc1_x"), "fc2"),  # timm SwiGLU
    Layout(("gate_proj", "up_proj"), "down_proj"),  # transformers DINOv2 with SwiGLU, DINOv3 gated
    Layout(("up_proj",), "down_proj"),  # transformers DINOv3
    # transformers DINOv2 with SwiGLU, in earlier releases
    Layout(("weights_in",), "weights_out", "swiglu"),
    Layout(("0",), "3"),  # torchvision MLPBlock and MLP
    Layout(("dense1",), "dense2"),  # transformers PVT
    # transformers VideoMAE, Swin V2
    Layout(("intermediate.dense",), "output.dense", parts=("intermediate", "output")),
    # transformers ConvNeXt and the official ConvNeXt; V2 has a norm between the two
    Layout(("pwconv1",), "pwconv2", parts=("pwconv1", "act", "pwconv2"), example=_image),
    Layout(  # transformers DINOv3 ConvNeXt
        ("pointwise_conv1",),
        "pointwise_conv2",
        parts=("pointwise_conv1", "activation_fn", "pointwise_conv2"),
        example=_image,
    ),
    Layout(("3",), "5", parts=("3", "4", "5"), example=_image),  # torchvision CNBlock.block
    Layout(  # nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
        ("linear1",),
        "linear2",
        parts=("linear1", "activation", "dropout", "linear2"),
        example=_tokens,
    ),
)
SUPPORTED = ", ".join(f"{' and '.join(layout.first)} → {layout.second}" for layout in LAYOUTS)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout whose layers this module has, from D features back to D: not the small MLPs of
    position biases, nor the narrow ones of squeeze-and-excitation."""
    for layout in LAYOUTS:
        first = [linear(module, name) for name in layout.first]
        second = linear(module, layout.second)
        if second is not None and all(layer and _leads_to(layer, second) for layer in first):
            return layout
    return None


def linear(module: nn.Module, name: str) -> nn.Linear | nn.Conv2d | None:
    """The layer of this name below the module, if it is a matrix product at each token."""
    found: Any = reduce(
        lambda at, part: getattr(at, part, None), name.split("."), cast(Any, module)
    )
    if isinstance(found, nn.Linear):
        return found
    if isinstance(found, nn.Conv2d):
        window = (found.kernel_size, found.stride, found.padding, found.groups)
        if window == ((1, 1), (1, 1), (0, 0), 1):
            return found
    return None


def _leads_to(first: nn.Linear | nn.Conv2d, second: nn.Linear | nn.Conv2d) -> bool:
    if isinstance(first, nn.Linear) and isinstance(second, nn.Linear):
        return first.in_features == second.out_features
    if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
        return first.in_channels == second.out_channels <= first.out_channels
    return False


def channels_first(module: nn.Module, layout: Layout) -> bool:
    """Whether the MLP takes images (B, D, H, W), not tokens (…, D)."""
    return isinstance(linear(module, layout.second), nn.Conv2d)


def parts_of(module: nn.Module, layout: Layout) -> dict[str, Any]:
    """Name → module or function of each part of the MLP that the block has."""
    parts = {name: getattr(module, name, None) for name in layout.parts}
    return {name: part for name, part in parts.items() if callable(part)}


def num_inputs(module: nn.Module) -> int:
    """How many tensors its forward must be given."""
    return sum(
        parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        for parameter in inspect.signature(module.forward).parameters.values()
    )


def takes_residual(part: Any) -> bool:
    """Whether the part is called with two tensors, of which it adds the second, as the ``output``
    of VideoMAE is."""
    return isinstance(part, nn.Module) and num_inputs(part) == 2


def run(module: nn.Module, layout: Layout, x: Tensor) -> Tensor:
    """What the library's own MLP makes of x (B, N, D)."""
    if channels_first(module, layout):
        y: Tensor = module(x.mT[..., None])  # the tokens of an image one below the other
        return y[..., 0].mT
    if not layout.parts:
        return module(x)
    y = x
    for part in parts_of(module, layout).values():
        y = part(y, torch.zeros_like(x)) if takes_residual(part) else part(y)
    return y
