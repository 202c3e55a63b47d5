"""Sparse upcycling: a trained dense model becomes one with experts."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels import topk_route
from ironmoe.moe.adapters.sharing import check_sharing
from ironmoe.moe.layers.dense_mlp import SUPPORTED, DenseMlp, describe_children, layout_of, read_mlp
from ironmoe.moe.layers.expert_linear import ExpertLinear
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.top_k import TopKRouter, router_options
from ironmoe.moe.vit.placement import placement

ROUTER_STD = 0.02
# With the expert's score as its gate, preferences of the router change the function.
ROUTER_STD_TOP_1 = 0.002


class AddResidual(nn.Module):
    """Takes the place of a transformers ``Output`` module, whose linear layer went to the experts
    before it."""

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return hidden + residual


def upcycle(
    model: nn.Module,
    num_experts: int,
    top_k: int = 2,
    *,
    layers: str | Iterable[int] = "all",
    noise: float = 0.0,
    renormalize: bool | float | None = None,
    router: dict[str, Any] | None = None,
    **moe_options: Any,
) -> nn.Module:
    """Turn dense MLPs into ``MoE`` layers whose experts are copies of the MLP (sparse upcycling,
    arXiv 2212.05055).

    ``model`` is a transformer, whose MLPs are replaced in place (a transformers, timm, torchvision
    or ironmoe one, or any other with MLPs of the same structure), or a single MLP. Only the router
    is new: small random weights N(0, 0.02²). Experts keep the MLP's device, dtype, requires_grad
    and training mode.

    Gates that sum to 1 leave the function as it was, up to rounding: with ``renormalize``
    (Mixtral's gates, the default for K > 1) or K = E, at noise 0 and without a capacity. Otherwise,
    as with V-MoE's own gates (``renormalize=False``, K < E), a token's MLP output shrinks by the
    sum of its K gates, about K / E at first. While all experts are equal, gates that sum to 1 have
    no gradient but that of the auxiliary losses, so add ``collect_aux_loss(model)`` to your loss:
    experts drift apart by the tokens they get.

    With K = 1 such a gate is always 1, and the task would never train the router. There the default
    is the expert's own score as the gate (Switch Transformer's), times a ``scale`` with which a
    router without preferences gives 1: E for a softmax. The router starts at N(0, 0.002²), so that
    the gates start near 1: see docs/adapters.md.

    Blocks that share one MLP module share one MoE.

    A checkpoint of an upcycled model loads into a dense model upcycled the same way.

    Args:
        num_experts: E; top_k: K, from 1 to E.
        layers: which blocks, counted from 0. "all"; "every n": blocks n-1, 2n-1, …; "last n": the
            last n of every second block, 1, 3, 5, …, so the final block is among them if the depth
            is even. Both have V-MoE's meaning. Or a list of indices; negative ones count from the
            last.
        noise: standard deviation of Gaussian noise on each expert's two weight matrices, as a
            fraction of the dense matrix's own. It comes from torch's global random numbers.
        renormalize: make the K gates of a token sum to 1; None: for K > 1.
        router: further keyword arguments of ``TopKRouter``, such as ``{"noise_std": 0.0}``.
        moe_options: further keyword arguments of ``MoE``, such as ``recompute=True``.

    Returns:
        The same model; for a single MLP, its MoE.

    Raises:
        ValueError: an argument outside the values above; an MLP that is not understood or cannot be
            an expert (dropout above 0, a norm inside, an activation without a kernel); an MLP that
            shares a parameter with another module, or is shared with a block that is not chosen; no
            chain of blocks with one MLP each, or more than one, as in CLIP: then pass the tower.
            The model is unchanged.
        TypeError: a count that is no whole number, a router that is no dict, or an unknown keyword.
    """
    for name, value in {"num_experts": num_experts, "top_k": top_k}.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
    if not (isinstance(noise, int | float) and 0 <= noise < math.inf):
        raise ValueError(f"noise must be a number of at least 0, got {noise!r}")
    options = router_options(router)
    make_router = partial(
        TopKRouter,
        num_experts=num_experts,
        top_k=top_k,
        renormalize=top_k > 1 if renormalize is None else renormalize,
        **options,
    )
    trial = make_router(dim=1, device="meta")  # names a wrong argument before any work
    std = ROUTER_STD
    if renormalize is None and top_k == 1:
        std = ROUTER_STD_TOP_1
        make_router = partial(make_router, **{"scale": _scale_of_gate_1(trial), **options})

    paths = _tower(model)
    chosen = [paths[i] for i in placement(layers, len(paths), "layers")]
    if not chosen:
        raise ValueError(
            f"layers must name at least one of the {len(paths)} blocks, got {layers!r}"
        )
    check_sharing(model, paths, chosen)
    moes: dict[nn.Module, MoE] = {}
    for path in chosen:
        mlp = model.get_submodule(path)
        if isinstance(mlp, MoE):
            raise ValueError(
                f"layers must name blocks with a dense MLP, but {path or 'this'} is an MoE already"
            )
        if mlp not in moes:
            moe = _moe(read_mlp(mlp, path), make_router, std, float(noise), moe_options)
            moes[mlp] = moe.train(mlp.training)
    for path in chosen:
        mlp = model.get_submodule(path)
        if mlp in moes and layout_of(mlp):  # else it has been replaced inside a shared block
            model = _replace(model, path, moes[mlp])
    return model


def _scale_of_gate_1(router: TopKRouter) -> float:
    """What makes the gate of a router without preferences 1."""
    even_TE = torch.zeros(1, router.num_experts, dtype=torch.float64, device="cpu")
    gates_TK = topk_route(even_TE, 1, score=router.score, order=router.order).gates
    return 1 / gates_TK.item()


def _moe(
    mlp: DenseMlp,
    make_router: partial[TopKRouter],
    router_std: float,
    noise: float,
    moe_options: dict[str, Any],
) -> MoE:
    place: dict[str, Any] = {"device": mlp.w_in.device, "dtype": mlp.w_in.dtype}
    router = make_router(dim=mlp.w_in.shape[1], **place)
    nn.init.normal_(router.weight, std=router_std)
    moe = MoE(
        router.dim,
        mlp.w_out.shape[1],
        router.num_experts,
        router.top_k,
        activation=mlp.activation,
        bias=mlp.b_in is not None or mlp.b_out is not None,
        router=router,
        **place,
        **moe_options,
    )
    moe.requires_grad_(
        any(t is not None and t.requires_grad for t in (mlp.w_in, mlp.b_in, mlp.w_out, mlp.b_out))
    )
    _copy(moe.fc1, mlp.w_in, mlp.b_in, noise)
    _copy(moe.fc2, mlp.w_out, mlp.b_out, noise)
    return moe


@torch.no_grad()
def _copy(experts: ExpertLinear, weight: Tensor, bias: Tensor | None, noise: float) -> None:
    """The dense layer into each expert, with noise on the weights."""
    experts.weight.copy_(weight).requires_grad_(weight.requires_grad)
    if noise:
        wide = torch.promote_types(weight.dtype, torch.float32)
        std = noise * weight.to(wide).std(correction=0)
        for expert in experts.weight:
            expert.add_(std * torch.randn_like(weight, dtype=wide))
    if bias is None:
        experts.bias = None
    elif experts.bias is not None:
        experts.bias.copy_(bias).requires_grad_(bias.requires_grad)


def _tower(model: nn.Module) -> list[str]:
    """Paths of the MLPs, one a block, of the model's only chain of blocks; [""] for a model that is
    an MLP itself."""
    sites = _sites(model)
    if "" in sites:
        return sites
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
    if not towers:
        raise ValueError(
            f"{type(model).__name__} has no nn.ModuleList or nn.Sequential of blocks with one "
            "known MLP each, only "
            f"{_describe_blocks(model)}. A known MLP has two nn.Linear layers ({SUPPORTED})"
        )
    if len(towers) > 1:
        found = ", ".join(f"{name} ({len(mlps)} blocks)" for name, mlps in towers.items())
        raise ValueError(
            f"model must have one tower of blocks, got several: {found}. Pass one: "
            f"upcycle(model.{name}, …)"
        )
    return next(iter(towers.values()))


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


def _describe_blocks(model: nn.Module) -> str:
    chains = [
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


def _replace(model: nn.Module, path: str, moe: MoE) -> nn.Module:
    """Put the MoE in the place of the MLP at ``path``."""
    mlp = model.get_submodule(path)
    layout = layout_of(mlp)
    if layout is not None and layout.split:
        mlp.intermediate, mlp.output = moe, AddResidual()
        return model
    if not path:
        return moe
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, moe)
    return model
