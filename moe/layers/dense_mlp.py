"""Dense two-layer MLPs of other libraries: known by the names of their layers, read, and checked by
what they compute."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from ironmoe.kernels.activations import ACTIVATIONS, get_activation
from ironmoe.kernels.route import holds_its_numbers


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


class Layout(NamedTuple):
    """Names of the nn.Linear layers of an MLP: ``first`` is one, or gate and up. ``activation`` is
    what the forward calls where it calls a function in place of a module."""

    first: tuple[str, ...]
    second: str
    activation: str | None = None

    @property
    def split(self) -> bool:
        """Whether the MLP is two modules of a block, ``intermediate`` and ``output``, of which
        ``output`` adds the residual."""
        return self.second.startswith("output.")

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the library's own MLP makes of x (B, N, D)."""
        if self.split:
            return module.get_submodule("output")(
                module.get_submodule("intermediate")(x), torch.zeros_like(x)
            )
        return module(x)


LAYOUTS = (
    # ironmoe; timm Mlp and GluMlp; transformers ViT, DeiT, BEiT, DINOv2, CLIP, SigLIP
    Layout(("fc1",), "fc2"),
    Layout(("fc1_g", "fc1_x"), "fc2"),  # timm SwiGLU
    Layout(("gate_proj", "up_proj"), "down_proj"),  # transformers DINOv2 with SwiGLU, DINOv3 gated
    Layout(("up_proj",), "down_proj"),  # transformers DINOv3
    # transformers DINOv2 with SwiGLU, in earlier releases
    Layout(("weights_in",), "weights_out", "swiglu"),
    Layout(("0",), "3"),  # torchvision MLPBlock
    Layout(("intermediate.dense",), "output.dense"),  # transformers VideoMAE
)
SUPPORTED = ", ".join(f"{' and '.join(layout.first)} → {layout.second}" for layout in LAYOUTS)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout whose nn.Linear layers this module has, from D features back to D: not the small
    MLPs of position biases."""
    for layout in LAYOUTS:
        first, second = (
            [_linear(module, name) for name in layout.first],
            _linear(module, layout.second),
        )
        if second and all(layer and layer.in_features == second.out_features for layer in first):
            return layout
    return None


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    """The nn.Linear of this name below the module."""
    found: Any = reduce(
        lambda at, part: getattr(at, part, None), name.split("."), cast(Any, module)
    )
    return found if isinstance(found, nn.Linear) else None


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
    first = [cast(nn.Linear, _linear(module, name)) for name in layout.first]
    second = cast(nn.Linear, _linear(module, layout.second))
    weights: list[Tensor] = [layer.weight for layer in first]
    biases: list[Tensor] = [layer.bias for layer in first if layer.bias is not None]
    if len(biases) not in (0, len(first)):
        fail(f"must have biases on both of {' and '.join(layout.first)} or on none")
    for tensor in (*weights, second.weight):
        if not holds_its_numbers(tensor):  # a quantised one says bfloat16, too
            fail(f"must have weights that are plain tensors, got a {type(tensor).__name__}")
    w_in, w_out = torch.cat(weights), second.weight
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
    if not w_in.is_meta:
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
    linear = (*layout.first, layout.second)

    def is_extra(name: str) -> bool:
        """Whether this name is part of the MLP, but not of its linear layers."""
        within = name.split(".")[0] in ("intermediate", "output") if layout.split else name
        return bool(within) and not any(
            name == layer or name.startswith(layer + ".") for layer in linear
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
    others = {name: m for name, m in leaves.items() if not isinstance(m, nn.Dropout | nn.Identity)}
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
            fail(f"has the activation {name}, {act}, which computes none of {', '.join(kind)}")
        return found
    # ironmoe's Mlp has its activation's name
    named: Any = getattr(module, "activation", layout.activation)
    if named not in ACTIVATIONS:
        fail("calls an activation that is not one of its modules")
    return named


@torch.no_grad()
def _check_values(
    module: nn.Module, layout: Layout, mlp: DenseMlp, fail: Callable[[str], NoReturn]
) -> None:
    """A module may have known layers and do something else with them: compare both on four random
    tokens."""
    x = torch.randn(
        1, 4, mlp.w_in.shape[1], generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(mlp.w_in)
    try:
        theirs = layout.run(module, x)
    except Exception as error:
        fail(f"cannot be run on tokens of shape {tuple(x.shape)} ({error})")
    tolerance = torch.finfo(x.dtype).eps ** 0.5 * theirs.abs().max().item()
    if not torch.allclose(theirs, mlp(x), rtol=0, atol=tolerance):
        fail(f"computes something else than its layers and {mlp.activation} say")
