"""Sparse upcycling: a trained dense model becomes one with experts."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels import topk_route
from ironmoe.kernels.checks import check_counts, check_module, check_whole
from ironmoe.moe.adapters.places import AddResidual as AddResidual  # where older pickles look
from ironmoe.moe.adapters.places import check_axes, replace, tower_of
from ironmoe.moe.adapters.recipe import decoded, steps_of
from ironmoe.moe.adapters.sharing import check_sharing
from ironmoe.moe.adapters.trial_in_place import check_in_place
from ironmoe.moe.layers.dense_mlp import DenseMlp, read_mlp
from ironmoe.moe.layers.expert_linear import ExpertLinear
from ironmoe.moe.layers.mlp_layouts import layout_of
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routers.top_k import TopKRouter, router_options
from ironmoe.moe.vit.placement import placement

ROUTER_STD = 0.02
# With the expert's score as its gate, preferences of the router change the function.
ROUTER_STD_TOP_1 = 0.002


def upcycle(
    model: nn.Module,
    num_experts: int,
    top_k: int = 2,
    *,
    layers: str | Iterable[int] = "all",
    mlp: str | None = None,
    noise: float = 0.0,
    renormalize: bool | float | None = None,
    router: dict[str, Any] | None = None,
    **moe_options: Any,
) -> nn.Module:
    """Turn dense MLPs into ``MoE`` layers whose experts are copies of the MLP (sparse upcycling,
    arXiv 2212.05055).

    ``model`` is one with blocks, whose MLPs are replaced in place (of transformers, timm,
    torchvision, ``nn.TransformerEncoder`` or ironmoe: ViTs, Swin, ConvNeXt, Mixers; or any other
    with MLPs of the same structure: docs/adapters.md), or a single MLP. Only the router is new:
    small random weights N(0, 0.02²). Experts keep the MLP's device, dtype, requires_grad and
    training mode.

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

    A checkpoint of an upcycled model loads into a dense model upcycled the same way: ``recipe_of``
    says which that is, ``save_upcycled`` and transformers' ``save_pretrained`` write it down.

    Args:
        num_experts: E; top_k: K, from 1 to E.
        layers: which blocks, counted from 0. "all"; "every n": blocks n-1, 2n-1, …; "last n": the
            last n of every second block, 1, 3, 5, …, so the final block is among them if the depth
            is even. Both have V-MoE's meaning. Or a list of indices; negative ones count from the
            last. Blocks are counted through all stages of a model, as of Swin and ConvNeXt.
        mlp: the name of the MLP in its block, where a block has several. In a Mixer, "mlp_channels"
            (None) routes patches, and "mlp_tokens" routes channels.
        noise: standard deviation of Gaussian noise on each expert's two weight matrices, as a
            fraction of the dense matrix's own. It comes from torch's global random numbers.
        renormalize: make the K gates of a token sum to 1; None: for K > 1.
        router: further keyword arguments of ``TopKRouter``, such as ``{"noise_std": 0.0}``.
        moe_options: further keyword arguments of ``MoE``, such as ``recompute=True``.

    Returns:
        The same model; for a single MLP, its MoE.

    Raises:
        ValueError: an argument outside the values above; an MLP that is not understood or cannot
            be an expert (dropout above 0, a norm inside, an activation without a kernel), or whose
            block computes something else with experts in its place; an MLP that shares a parameter
            with another module, or is shared with a block that is not chosen; no chain of blocks
            with one MLP each, or more than one, as in CLIP: then pass the tower. The model is
            unchanged.
        TypeError: a model that is no module, a count that is no whole number, a router that is no
            dict, or an unknown keyword.
    """
    check_module(model)
    check_counts(num_experts=num_experts)
    check_whole(top_k=top_k)
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

    paths = tower_of(model, mlp)
    chosen = [paths[i] for i in placement(layers, len(paths), "layers")]
    if not chosen:
        raise ValueError(
            f"layers must name at least one of the {len(paths)} blocks, got {layers!r}"
        )
    check_sharing(model, paths, chosen)
    noise = float(noise)
    return _with_experts(model, chosen, make_router, std, moe_options, noise=noise, said=noise)


def upcycle_by_recipe(model: nn.Module, recipe: dict[str, Any]) -> nn.Module:
    """Give a dense model the structure of an upcycled one, for weights that are loaded next:
    ``recipe_of`` says what it was. Experts start as copies, without the noise of the recipe.

    Returns:
        The same model; for a single MLP, its MoE.

    Raises:
        ValueError: no recipe, or one in a newer format; an MLP that the model lacks or that is not
            understood. The model may be changed then.
        TypeError: the model is no module.
    """
    check_module(model)
    for step in steps_of(recipe):
        options = decoded(step["router"])
        try:
            make_router = partial(TopKRouter, **options)
            make_router(dim=1, device="meta")
            lacks = [path for path in step["mlps"] if not _has(model, path)]
            if lacks:
                raise ValueError(
                    f"recipe must name MLPs of the model, got {lacks[0]}, which "
                    f"{type(model).__name__} lacks"
                )
            moe_options, said = decoded(step["moe"]), step["noise"]
            model = _with_experts(
                model, step["mlps"], make_router, ROUTER_STD, moe_options, noise=0.0, said=said
            )
        except TypeError as error:
            raise ValueError(f"recipe must have options of this version, got {error}") from error
    return model


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _with_experts(
    model: nn.Module,
    chosen: list[str],
    make_router: partial[TopKRouter],
    router_std: float,
    moe_options: dict[str, Any],
    *,
    noise: float,
    said: float,
) -> nn.Module:
    """Put experts into the place of the dense MLPs at these paths; all are made before the first is
    replaced. ``said``: the noise that the recipe names."""
    moes: dict[nn.Module, MoE] = {}
    for path in chosen:
        mlp = model.get_submodule(path)
        if isinstance(mlp, MoE):
            raise ValueError(
                f"layers must name blocks with a dense MLP, but {path or 'this'} is an MoE already"
            )
        if mlp not in moes:
            dense = read_mlp(mlp, path)
            check_in_place(model, path, dense)
            moe = _moe(dense, make_router, router_std, noise, moe_options)
            check_axes(mlp, moe, path)
            moes[mlp] = moe.train(mlp.training)
    for path in chosen:
        mlp = model.get_submodule(path)
        if mlp in moes and layout_of(mlp):  # else it has been replaced inside a shared block
            model = replace(model, path, moes[mlp], said)
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
