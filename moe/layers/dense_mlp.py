"""Dense two-layer MLPs of other libraries: known by the names of their layers, read, and checked by
what they compute."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from ironmoe.kernels.activations import ACTIVATIONS, get_activation
from ironmoe.kernels.route import holds_its_numbers
from ironmoe.moe.layers.mlp_layouts import (
    SUPPORTED,
    Layout,
    layout_of,
    linear,
    num_inputs,
    parts_of,
    run,
)
from ironmoe.moe.layers.mlp_trial import calls_within


class DenseMlp(NamedTuple):
    """y = W₂ act(W₁ x + b₁) + b₂. ``w_in`` (F, D), or (2F, D) as [gate | up] for a gated
    activation; ``b_in`` (F) or (2F); ``w_out`` (D, F); ``b_out`` (D). The biases may be None.
    requires_grad is that of the layers."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, D)."""
        hidden = nn.functional.linear(x, self.w_in, self.b_in)
        return nn.functional.linear(
            get_activation(self.activation).value(hidden), self.w_out, self.b_out
        )


@torch.no_grad()
def activation_name(act: Callable[[Tensor], Tensor], gated: bool = False) -> str | None:
    """The name in ``ACTIVATIONS`` of what ``act`` computes, or of the unit it gates; None if there
    is none.

    Values are compared in float64, so that the many classes of the many libraries need no list:
    GELU and its tanh form differ by 5e-4, two ways to write the same one by less than 1e-10.
    """
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        return None
    points = torch.linspace(-30, 30, 481, dtype=torch.float64, device="cpu")
    up = points.flip(0)
    # the clone is for activations that work in place
    wanted = act(points.clone()) * (up if gated else 1)
    hidden = torch.cat([points, up]) if gated else points
    for name, activation in ACTIVATIONS.items():
        if activation.gated == gated and torch.allclose(
            activation.value(hidden), wanted, rtol=1e-9, atol=1e-9
        ):
            return name
    return None


@torch.enable_grad()  # under no_grad the joined weights would forget that they require grad
def read_mlp(module: nn.Module, path: str = "") -> DenseMlp:
    """The weights and the activation of a dense MLP; ``path`` is where it lies, for the errors.

    Raises:
        ValueError: the module is not known, has dropout, a norm or other parameters, an activation
            without a kernel, or a forward that computes something else than its layers say.
    """
    label = f"{path} ({type(module).__name__})" if path else type(module).__name__

    def fail(reason: str) -> NoReturn:
        raise ValueError(
            f"{label} {reason}. Supported are two nn.Linear layers ({SUPPORTED}) with one "
            "activation between them"
        )

    layout = layout_of(module)
    if layout is None:
        fail(f"is not a known two-layer MLP: it holds {describe_children(module)}")
    first = [cast(nn.Linear, linear(module, name)) for name in layout.first]
    second = cast(nn.Linear, linear(module, layout.second))
    weights: list[Tensor] = [layer.weight for layer in first]
    biases: list[Tensor] = [layer.bias for layer in first if layer.bias is not None]
    if len(biases) not in (0, len(first)):
        fail(f"must have biases on both of {' and '.join(layout.first)} or on none")
    for tensor in (*weights, second.weight):
        if not holds_its_numbers(tensor):  # a quantised one says bfloat16, too
            fail(f"must have weights that are plain tensors, got a {type(tensor).__name__}")
    # a convolution has two axes of size 1 more
    w_in, w_out = torch.cat(weights).flatten(1), second.weight.flatten(1)
    b_in = torch.cat(biases) if biases else None
    hidden_dim = w_out.shape[1]
    if not (w_in.is_floating_point() and w_out.is_floating_point()):
        fail(f"must have weights of a float dtype, got {w_in.dtype} and {w_out.dtype}")
    if len(w_in) not in (hidden_dim, 2 * hidden_dim):
        fail(
            "must have a second layer of as many inputs as the first has outputs, or half: got "
            f"{len(w_in)} and {hidden_dim}"
        )
    gated = len(w_in) == 2 * hidden_dim
    if gated and getattr(module, "gate_last", False):  # timm's GluMlp: [up | gate]
        w_in, b_in = w_in.roll(hidden_dim, 0), None if b_in is None else b_in.roll(hidden_dim, 0)
    mlp = DenseMlp(w_in, b_in, w_out, second.bias, _activation(module, layout, gated, fail))
    _check_values(module, layout, mlp, fail)
    return mlp


def describe_children(module: nn.Module) -> str:
    """Names and classes, as in norm1 (LayerNorm), attn (Attention)."""
    return (
        ", ".join(f"{name} ({type(child).__name__})" for name, child in module.named_children())
        or "no modules"
    )


def _activation(
    module: nn.Module, layout: Layout, gated: bool, fail: Callable[[str], NoReturn]
) -> str:
    """The activation's name, after a look at everything else that the MLP holds."""
    layers = (*layout.first, layout.second)
    parts = parts_of(module, layout)

    def is_extra(name: str) -> bool:
        """Whether this name is part of the MLP, but not of its layers."""
        within = name.split(".")[0] in parts if parts else name
        return bool(within) and not any(
            name == layer or name.startswith(layer + ".") for layer in layers
        )

    leaves = {
        name: m for name, m in module.named_modules() if is_extra(name) and not any(m.children())
    }
    dropouts = [
        f"{name} with p = {m.p}"
        for name, m in leaves.items()
        if isinstance(m, nn.Dropout) and m.p > 0
    ]
    if dropouts:
        fail(
            f"has dropout, {', '.join(dropouts)}, which experts do not have: set it to 0 first, "
            "and put an nn.Dropout behind the MLP if you need one"
        )
    others: dict[str, Any] = {
        name: m for name, m in leaves.items() if not isinstance(m, nn.Dropout | nn.Identity)
    }
    others |= {name: part for name, part in parts.items() if not isinstance(part, nn.Module)}
    parameters = [name for name, _ in module.named_parameters() if is_extra(name)]
    if len(others) > 1 or parameters:
        modules = [f"{name} ({type(m).__name__})" for name, m in others.items()]
        fail(
            "holds more than two linear layers and an activation: "
            f"{', '.join(modules + parameters)}"
        )
    for name, act in others.items():
        found = activation_name(act, gated)
        if found is None:
            kind = [known for known, activation in ACTIVATIONS.items() if activation.gated == gated]
            shown = act if isinstance(act, nn.Module) else getattr(act, "__name__", act)
            fail(f"has the activation {name}, {shown}, which computes none of {', '.join(kind)}")
        return found
    # ironmoe's Mlp has its activation's name; what a block calls itself cannot be taken out of it
    named: Any = None if parts else getattr(module, "activation", layout.activation)
    if named not in ACTIVATIONS:
        fail("calls an activation that is not one of its modules")
    return named


@torch.no_grad()
def _check_values(
    module: nn.Module, layout: Layout, mlp: DenseMlp, fail: Callable[[str], NoReturn]
) -> None:
    """A module may have known layers and do something else with them: compare both on a few random
    tokens. A meta tensor has no values; there only the calls of a block are looked at."""
    dim = mlp.w_in.shape[1]
    if layout.example is None:
        if mlp.w_in.is_meta:
            return
        x = _random((1, 4, dim), mlp.w_in)
        try:
            theirs = run(module, layout, x)
        except Exception as error:
            fail(f"cannot be run on tokens of shape {tuple(x.shape)} ({error})")
    else:
        x, theirs = _inside_block(module, layout, layout.example(dim), mlp, fail)
        if theirs.is_meta:
            return
    tolerance = torch.finfo(x.dtype).eps ** 0.5 * theirs.abs().max().item()
    if not torch.allclose(theirs, mlp(x), rtol=0, atol=tolerance):
        fail(f"computes something else than its layers and {mlp.activation} say")


def _inside_block(
    block: nn.Module,
    layout: Layout,
    shape: tuple[int, ...],
    mlp: DenseMlp,
    fail: Callable[[str], NoReturn],
) -> tuple[Tensor, Tensor]:
    """What a block gives to its MLP and takes from it, and that it calls nothing else between."""
    parts = parts_of(block, layout)
    try:
        inputs = [_random(shape, mlp.w_in)] * num_inputs(block)
        names, x, y = calls_within(block, parts, inputs)
    except Exception as error:
        fail(f"cannot be run on an input of shape {shape} ({error})")
    modules = dict(block.named_modules())
    names = [name for name in names if name in parts or not _does_nothing(modules[name])]
    if names != list(parts) or x is None or y is None:
        shown = {name: f"{name} ({type(m).__name__})" for name, m in modules.items()}
        found = ", ".join(shown.get(name, name) for name in names) or "none of them"
        fail(
            f"must call {', '.join(parts)} once each and nothing between them, because experts "
            f"have nothing else, got {found}"
        )
    return x, y


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
