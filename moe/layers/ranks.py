"""Layers whose experts are shared out over ranks: their weights, and the way of their tokens."""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.kernels import Dispatch, Routing
from ironmoe.kernels.checks import check_counts
from ironmoe.moe.exchange.agreement import Place
from ironmoe.moe.exchange.eager import outside_graphs
from ironmoe.moe.exchange.errors import RanksDisagreeError
from ironmoe.moe.exchange.expert_parallel import ExpertParallel, nothing
from ironmoe.moe.exchange.group import Group
from ironmoe.moe.layers.expert_linear import TwoLayers, with_weights
from ironmoe.moe.routers.groups import Grouped
from ironmoe.moe.routers.wrapped import unwrapped

GRADIENTS = ("mean", "sum")
AUX_LOSSES = ("rank", "all")

# (routing to experts that are here, dispatch, dispatch_dtype) → the product with their weights
With = Callable[[Routing, Dispatch | None, torch.dtype | None], TwoLayers]
# x (T, D), routing, dispatch: over all experts
Tokens = tuple[Tensor, Routing, Dispatch | None]


class ExpertLayer(Protocol):
    """What a layer has whose experts can be shared out over ranks; it is a module.

    num_experts: E. expert_parallel: how they are shared out; None where they are not.
    """

    num_experts: int
    expert_parallel: ExpertParallel | None

    def expert_modules(self) -> dict[str, nn.Module]:
        """The modules, by name, whose parameters are the weights of the experts: the first axis of
        each counts experts."""
        ...


def share_out(
    layer: Any,
    mesh: Any,
    *,
    gradients: str = "mean",
    aux_losses: str = "rank",
    max_tokens_per_rank: int | None = None,
    group: Group | None = None,
    place: Place | None = None,
) -> None:
    """Share the experts of a layer out over the P ranks of a mesh. Each of them must call it.

    The weights and biases of the experts (``fc1.weight``, …) become DTensors, sharded by experts;
    all parameters and buffers of the layer take the values of the first rank. From then on each
    rank gives the layer tokens of its own, any number of them, and rows travel to the ranks of
    their experts and back. Every rank must make every pass, and every backward pass, also without
    a token.

    Other groups of ranks know nothing of it: where a mesh has copies of this one, they must begin
    with equal weights, and average their gradients (``average_gradients``), as ``parallelize`` does
    it for a whole mesh.

    Args:
        layer: an ``MoE``, ``SoftMoE`` or another ``ExpertLayer``; it is changed.
        mesh: a ``DeviceMesh`` of one dimension, such as ``mesh["ep"]``, whose size divides E.
        gradients: what the gradients of the experts are: "mean", that over the ranks, as data
            parallelism and FSDP2 make it of all other weights, for a loss that is the mean over the
            tokens of a rank; or "sum", for a loss that is a sum over its tokens divided by their
            number on all ranks.
        aux_losses: over which tokens a router computes its losses: "rank", those of its own rank,
            as groups of V-MoE never span devices; or "all", those of all ranks of the mesh, which
            is the loss of one process that has all tokens (``compute_losses_over``).
        max_tokens_per_rank: a rank sends at most so many rows (tokens times choices) to each rank
            of the mesh. No shape then depends on values and the host never waits, so a GPU can
            capture the layer in a CUDA graph. What finds no place is dropped and counted
            (``overflowed_choices``), and a warning says so: on CPU at once, on a GPU when a later
            pass comes. None: every row travels, and the host waits for one exchange of counts.
        group, place: the ranks, and which layer of which model this is, where a model has several.

    Raises:
        ValueError: the mesh has more dimensions, its size does not divide E, the experts are shared
            out already, or another argument is outside the above.
        TypeError: mesh is no DeviceMesh, or the weights are not those of the layer itself.
        RanksDisagreeError: the ranks have layers of other sizes or dtypes, or other arguments.
    """
    check_layer(layer, mesh, gradients, max_tokens_per_rank)
    check_aux_losses(layer, aux_losses)
    group = group or Group(mesh.get_group())
    options: dict[str, Any] = {"gradients": gradients, "aux_losses": aux_losses}
    check_same(layer, group, options | {"max_tokens_per_rank": max_tokens_per_rank})
    place = place or Place(model=group.next_model())

    same_values(layer, group)
    for module in layer.expert_modules().values():
        _shard(module, mesh)
    layer.expert_parallel = ExpertParallel(
        group,
        layer.num_experts,
        place=place,
        gradients=gradients,
        max_tokens_per_rank=max_tokens_per_rank,
    )
    if aux_losses == "all":
        compute_losses_over(layer, group)


def compute_losses_over(layer: nn.Module, ranks: Group) -> None:
    """Compute the losses of the layer's router over the tokens of all ranks of a group, in
    training.

    Each rank then has the loss of all tokens, and its gradient is the sum over these losses: the
    mean over ranks, which data parallelism makes of gradients, is that of one process. Where
    gradients are sums over ranks, add the loss divided by the number of ranks to yours. Groups of
    tokens, as those of a capacity, and sequences are always those of a rank: the loss is their mean
    over all ranks.
    """
    router = _router(layer)
    if router is not None:
        router.loss_ranks = ranks


def check_aux_losses(layer: nn.Module, aux_losses: str) -> None:
    """ValueError unless the layer's router can compute its losses so."""
    if aux_losses not in AUX_LOSSES:
        raise ValueError(f"aux_losses must be one of {AUX_LOSSES}, got {aux_losses!r}")
    router = _router(layer)
    if aux_losses == "all" and not (router is None or hasattr(router, "loss_ranks")):
        raise ValueError(
            "aux_losses must be 'rank' for a router whose losses are its own, got 'all' for a "
            f"{type(router).__name__}"
        )


def _router(layer: nn.Module) -> Any:
    """The router inside its wrappers; None where there is none, or where experts choose tokens,
    which has no loss."""
    router = getattr(layer, "router", None)
    router = None if router is None else unwrapped(router)
    return None if isinstance(router, Grouped) else router


@outside_graphs
def through_ranks(
    parallel: ExpertParallel,
    modules: tuple[nn.Module, nn.Module],
    tokens: Tokens,
    with_experts: With,
    *,
    dispatch_dtype: torch.dtype | None = None,
    meanwhile: Callable[[], None] = nothing,
) -> Tensor:
    """y (T, D) of tokens whose experts are on several ranks; modules: fc1 and fc2."""
    for module in modules:
        check_no_adapter(module)
    x_TD, routing, dispatch = tokens

    def layer(x_TD: Tensor, *weights: Tensor | None) -> Tensor:
        w_in, b_in, w_out, b_out = map(parallel.local, weights)

        def rows(x_RD: Tensor, own: Routing) -> Tensor:
            return with_experts(own, None, None)(x_RD, w_in, b_in, w_out, b_out)

        def all_tokens(x_TD: Tensor, own: Routing) -> Tensor:
            return with_experts(own, None, dispatch_dtype)(x_TD, w_in, b_in, w_out, b_out)

        return parallel(
            x_TD,
            routing,
            dispatch,
            experts=rows,
            layer=all_tokens,
            weights_need_grad=any(w is not None and w.requires_grad for w in weights),
            travel_dtype=dispatch_dtype,
            meanwhile=meanwhile,
        )

    return with_weights(*modules, x_TD, layer)


def check_no_adapter(module: nn.Module) -> None:
    """TypeError if PEFT adapts weights of experts that are shared out."""
    adapters = [m for m in module.modules() if type(m).__module__.startswith("peft.")]
    if adapters:
        raise TypeError(
            "experts that are shared out over ranks must have no adapter of PEFT, which knows "
            f"whole weights only, got a {type(adapters[0]).__name__}: adapt other layers, or train "
            "the experts themselves"
        )


@torch.no_grad()
def same_values(module: nn.Module, group: Group) -> None:
    """Every parameter and buffer of the module takes the values of the first rank of the group. One
    that has no values, as on the meta device, stays as it is, and so does a DTensor."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_meta or hasattr(tensor, "device_mesh"):
            continue
        values = tensor.detach().contiguous()
        if values.numel():  # gloo has not all dtypes
            group.broadcast(values.view(-1).view(torch.uint8))
            tensor.detach().copy_(values)


def _shard(module: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    for name, weight in module.named_parameters(recurse=False):
        # Every rank has the whole already, maybe in host memory: only its part goes to the device.
        own = weight.detach().chunk(mesh.size())[mesh.get_local_rank()]
        own = own.clone() if own.is_meta else own.to(mesh.device_type, copy=True)
        own = own.contiguous()
        part = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(part, requires_grad=weight.requires_grad))


def check_layer(layer: Any, mesh: Any, gradients: str, max_tokens_per_rank: int | None) -> None:
    """TypeError or ValueError, as ``share_out`` says, before anything is changed."""
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh, such as init_device_mesh(…)['ep'], got {mesh!r}"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, such as mesh['ep'], got {mesh.ndim}: {mesh}"
        )
    if not bool((mesh.mesh.diff() > 0).all()):
        raise ValueError(
            f"mesh must have its ranks in ascending order, as torch has those of a process group, "
            f"got {mesh.mesh.tolist()}"
        )
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {GRADIENTS}, got {gradients!r}")
    if max_tokens_per_rank is not None:
        check_counts(max_tokens_per_rank=max_tokens_per_rank)
    if getattr(layer, "expert_parallel", None) is not None:
        raise ValueError("layer must not be parallelized yet, got one whose experts are shared out")
    if layer.num_experts % mesh.size():
        raise ValueError(
            f"mesh must have a size that divides num_experts = {layer.num_experts}, got "
            f"{mesh.size()}"
        )
    for name, module in layer.expert_modules().items():
        held = dict(module.named_parameters())
        if module._forward_pre_hooks or any("." in weight for weight in held):
            raise TypeError(
                f"{name} must be the layer's own module, got a {type(module).__name__} that "
                "another library has changed: parallelize first, and wrap, prune or shard it then"
            )
        sharded = [weight for weight, value in held.items() if hasattr(value, "device_mesh")]
        if sharded:
            raise ValueError(
                f"{name}.{sharded[0]} must not be shared out over processes yet, got a "
                f"{type(held[sharded[0]]).__name__}: parallelize first"
            )


def check_same(module: nn.Module, group: Group, options: dict[str, Any]) -> None:
    """Compare a module and options with those of the other ranks, before anything of it travels.

    Raises:
        RanksDisagreeError: they differ. Every rank of the group raises it.
    """
    named = (*module.named_parameters(), *module.named_buffers())
    own = [("class", type(module).__name__), *options.items()]
    own += [(name, (tuple(t.shape), t.dtype, t.is_meta)) for name, t in named]
    for rank, other in enumerate(group.each(own)):
        here, there = next(((a, b) for a, b in zip_longest(own, other) if a != b), (None, None))
        if here != there:
            raise RanksDisagreeError(
                "ranks must parallelize the same model in the same way, got "
                f"{_words(here)} on rank {dist.get_rank()} and {_words(there)} on rank "
                f"{group.global_rank(rank)}"
            )


def _words(entry: tuple[str, Any] | None) -> str:
    if entry is None:
        return "no further weight"
    name, value = entry
    if isinstance(value, tuple) and len(value) == 3:
        shape, dtype, is_meta = value
        return f"{name} of shape {shape}, {dtype}{' on the meta device' * is_meta}"
    return f"{name} = {value!r}"
