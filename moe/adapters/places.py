"""Where a model has its MLPs: one a block, through all stages; and experts put in their place."""

from typing import Any

from torch import Tensor, nn

from ironmoe.moe.adapters.recorded import record
from ironmoe.moe.layers.dense_mlp import describe_children
from ironmoe.moe.layers.mlp_layouts import (
    SUPPORTED,
    channels_first,
    layout_of,
    parts_of,
    takes_residual,
)
from ironmoe.moe.layers.moe import MoE

# Of the two MLPs of a Mixer's block, the one whose tokens are patches.
CHANNEL_MLP = "mlp_channels"


class AddResidual(nn.Module):
    """Takes the place of a transformers ``Output`` module, whose linear layer went to the experts
    before it."""

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return hidden + residual


class ChannelsFirst(nn.Module):
    """Experts for images (B, D, H, W), in the place of two 1 × 1 convolutions: each pixel is a
    token."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) → the same shape."""
        tokens_BND = x.flatten(2).mT
        y: Tensor = self.moe(tokens_BND)
        return y.mT.unflatten(2, x.shape[2:])


def tower_of(model: nn.Module, mlp: str | None = None) -> list[str]:
    """Paths of the MLPs, dense or MoE, one a block in the order of the blocks; [""] for a model
    that is an MLP itself.

    Args:
        mlp: the name of the MLP in a block, where a block has several; None: its only one, or
            ``mlp_channels``.
    """
    sites = _sites(model)
    if "" in sites and mlp is None:
        return sites
    if mlp is not None:
        named = _named(sites, mlp)
        if not named:
            raise ValueError(
                f"mlp must be the name of an MLP in the blocks of {type(model).__name__}, got "
                f"{mlp!r}, and it has {', '.join(sites) or 'none that is known'}"
            )
        sites = named
    towers = _towers(model, sites) or _towers(model, _named(sites, CHANNEL_MLP))
    if not towers:
        raise ValueError(_no_tower(model, sites))
    if len(towers) > 1:
        found = ", ".join(f"{name} ({len(mlps)} blocks)" for name, mlps in towers.items())
        *_, last = towers
        around, _, _ = last.rpartition(".")
        # a whole encoder, because its fast path must be left
        whole = nn.TransformerEncoder | nn.TransformerDecoder
        one = around if isinstance(model.get_submodule(around), whole) else last
        raise ValueError(
            f"model must have one tower of blocks, got several: {found}. Pass one: "
            f"upcycle(model.{one}, …)"
        )
    return next(iter(towers.values()))


def replace(model: nn.Module, path: str, moe: MoE, noise: float) -> nn.Module:
    """Put the MoE in the place of the dense MLP at ``path``, and let it know. Returns the model;
    the MoE where the model is that MLP."""
    mlp = model.get_submodule(path)
    layout = layout_of(mlp)
    assert layout is not None
    parts = parts_of(mlp, layout)
    if parts:
        first, *between, last = parts
        residual = takes_residual(parts[last])
        for name in parts:
            vars(mlp).pop(name, None)  # a function
        setattr(mlp, first, moe)
        record(moe, noise, first)
        for name in between:
            setattr(mlp, name, nn.Identity())
        setattr(mlp, last, AddResidual() if residual else nn.Identity())
        _leave_fast_path(model, path)
        return model
    experts: nn.Module = moe
    if channels_first(mlp, layout):
        experts = ChannelsFirst(moe)
    record(moe, noise, "" if experts is moe else "moe")
    if not path:
        return experts
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, experts)
    return model


def check_axes(mlp: nn.Module, moe: MoE, path: str) -> None:
    """ValueError if the layer asks which tokens belong together and would be told wrong: a block
    with ``batch_first=False`` has the images on the second axis."""
    batch_first = getattr(getattr(mlp, "self_attn", None), "batch_first", True)
    by_image = getattr(moe.capacity, "images_per_group", None) is not None
    if not batch_first and (by_image or getattr(moe.router, "needs_sequence_length", False)):
        raise ValueError(
            f"batch_first must be True in {path or 'the block'} for options that look at one image "
            "or sequence at a time, got False"
        )


def _leave_fast_path(model: nn.Module, path: str) -> None:
    """Torch's fused encoder reads the weights of two linear layers and skips experts."""
    layer = model.get_submodule(path)
    if hasattr(layer, "activation_relu_or_gelu"):
        layer.activation_relu_or_gelu = 0  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(m is layer for m in module.layers):
            module.use_nested_tensor = False


def _named(sites: list[str], name: str) -> list[str]:
    # a layer of experts for images lies inside of what took the MLP's place
    ends = (f".{name}", f".{name}.moe")
    return [site for site in sites if f".{site}".endswith(ends)]


def _towers(model: nn.Module, sites: list[str]) -> dict[str, list[str]]:
    """Name of a tower → paths of its MLPs, one a block."""
    chains: dict[str, list[str]] = {}
    for name, chain in model.named_modules():
        if not isinstance(chain, nn.ModuleList | nn.Sequential):
            continue
        blocks = [f"{name}.{child}" if name else child for child, _ in chain.named_children()]
        mlps = [[site for site in sites if _within(site, block)] for block in blocks]
        if mlps and all(len(found) == 1 for found in mlps):
            chains[name] = [found[0] for found in mlps]
    towers: dict[str, list[str]] = {}
    # a chain around or inside a longer one is not a tower
    for name in sorted(chains, key=lambda name: -len(chains[name])):
        if not any(set(chains[name]) & set(taken) for taken in towers.values()):
            towers[name] = chains[name]
    return _joined(model, {name: towers[name] for name in chains if name in towers})


def _joined(model: nn.Module, towers: dict[str, list[str]]) -> dict[str, list[str]]:
    """Towers that lie in the same nn.ModuleList or nn.Sequential are the stages of one."""
    if len(towers) < 2:
        return towers
    parts = [name.split(".") for name in towers]
    shared = 0
    while all(len(p) > shared and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    name = ".".join(parts[0][:shared])
    if not isinstance(model.get_submodule(name), nn.ModuleList | nn.Sequential):
        return towers
    return {name: [site for mlps in towers.values() for site in mlps]}


def _sites(model: nn.Module, path: str = "") -> list[str]:
    """Paths of all MLPs, dense or MoE, outermost only and in order."""
    if isinstance(model, MoE) or layout_of(model):
        return [path]
    return [
        site
        for name, child in model.named_children()
        for site in _sites(child, f"{path}.{name}" if path else name)
    ]


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def _no_tower(model: nn.Module, sites: list[str]) -> str:
    """Why there is none."""
    known = "one known MLP each"
    if sites:
        more = ", …" if len(sites) > 4 else ""
        known += (
            f" (known are {', '.join(sites[:4])}{more}; mlp='…' names one of several in a block)"
        )
    return (
        f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of blocks with {known}, "
        f"only {_describe_blocks(model)}. A known MLP has two nn.Linear layers ({SUPPORTED})"
    )


def _describe_blocks(model: nn.Module) -> str:
    chains: list[tuple[str, Any]] = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential)
    ]
    chains = [
        (name, chain) for name, chain in chains if any(any(block.children()) for block in chain)
    ]
    if not chains:
        return describe_children(model)
    name, chain = max(chains, key=lambda item: len(item[1]))
    return f"{name or 'blocks'} of {type(chain[0]).__name__} with {describe_children(chain[0])}"
