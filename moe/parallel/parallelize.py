"""A model on a mesh of devices: experts by expert parallelism, the rest by FSDP2 or copied."""

import inspect
from typing import Any, TypeVar

from torch import nn

from ironmoe.moe.exchange.agreement import Place
from ironmoe.moe.exchange.group import Group, every_rank, wait_as_long_as_all
from ironmoe.moe.layers.ranks import (
    check_aux_losses,
    check_layer,
    check_same,
    compute_losses_over,
    same_values,
    share_out,
)
from ironmoe.moe.parallel.blocks import blocks
from ironmoe.moe.parallel.layers import check_untied, expert_layers

DIMENSIONS = ("dp", "fsdp", "ep")

# The attribute in which a model keeps what ``parallelize`` was told about its gradients; copies of
# the model have it, too.
TOLD = "_ironmoe_gradients"

_Model = TypeVar("_Model", bound=nn.Module)


def parallelize(
    model: _Model,
    mesh: Any,
    *,
    gradients: str = "mean",
    aux_losses: str = "rank",
    max_tokens_per_rank: int | None = None,
    **fsdp_options: Any,
) -> _Model:
    """Put a model on the ranks of a mesh. Each rank then works on images or tokens of its own.

    Dimensions of the mesh are known by their names; each may be missing:

    - "ep": the experts of each layer are shared out over it (``MoE.parallelize``);
    - "fsdp": FSDP2 shards the experts over it, and all other weights over it and "ep" together,
      block by block (``torch.distributed.fsdp.fully_shard``);
    - "dp": copies of all that. With "fsdp", FSDP2 keeps them equal.

    Without "fsdp" nobody averages the gradients: call ``average_gradients(model, mesh)`` after
    ``backward()``. Every rank must make every pass, also without a token.

    Args:
        model: a layer, a ``VMoE``, an upcycled model, a Hugging Face model after
            ``huggingface.patch``, or any module around such layers. It is changed. All ranks take
            the weights of the first one; weights on the meta device get their values afterwards
            (``to_empty``, then ``load_weights`` or a checkpoint).
        mesh: a ``DeviceMesh`` over all ranks, such as ``init_device_mesh("cuda", (4, 2),
            mesh_dim_names=("fsdp", "ep"))``; one dimension without a name is "ep".
        gradients: "mean", for a loss that is the mean over what a rank has; or "sum", for one that
            is a sum over that, divided by how much all ranks have together. An auxiliary loss is
            a mean in any case: with "sum", divide it by the number of ranks.
        aux_losses: "rank": a router computes its losses over the tokens of its own rank, as groups
            of V-MoE never span devices; "all": over the tokens of all ranks of the mesh, which
            gives the loss and the gradients of one process that has all of them. Groups of a
            capacity and sequences are those of a rank; the loss is their mean over all ranks.
        max_tokens_per_rank: as for ``MoE.parallelize``.
        fsdp_options: such as ``mp_policy``, for ``fully_shard``.

    Returns:
        ``model`` itself. Compile it afterwards; wrap blocks for activation checkpointing before.

    Raises:
        TypeError, ValueError: the model has no layer with experts, or one that is not patched,
            cannot run on ironmoe's kernels, or shares weights with another; the mesh has another
            dimension; or an argument does not fit (``MoE.parallelize``).
        RanksDisagreeError: the ranks have other models or arguments.
    """
    names = dimensions(mesh)
    layers = expert_layers(model)
    everyone = every_rank()
    options: dict[str, Any] = {"layers with experts": list(layers), "gradients": gradients}
    options |= {"aux_losses": aux_losses, "max_tokens_per_rank": max_tokens_per_rank}
    check_same(model, everyone, options)
    if mesh.size() != everyone.size:
        raise ValueError(
            f"mesh must hold all {everyone.size} ranks, got one of {mesh.size()}: give the whole "
            "mesh, or one layer its part by MoE.parallelize(mesh['ep'])"
        )
    if not layers:
        raise ValueError(
            f"model must have layers with experts to share out, got a {type(model).__name__} "
            "without any"
        )
    _check_fsdp(model, fsdp_options, names)

    check_untied(model, layers)
    over = (mesh if mesh.ndim == 1 else mesh["ep"]) if "ep" in names else None
    for layer in layers.values():
        check_aux_losses(layer, aux_losses)
        if over is not None:
            check_layer(layer, over, gradients, max_tokens_per_rank)
    same_values(model, everyone)
    _wait_as_long_as_all(mesh)
    if over is not None:
        group = Group(over.get_group())
        replicated = "dp" in names and "fsdp" not in names and mesh["dp"].size() > 1
        copies = Group(mesh.get_group("dp")) if replicated else None
        number = group.next_model()
        for index, layer in enumerate(layers.values()):
            share_out(
                layer,
                over,
                gradients=gradients,
                max_tokens_per_rank=max_tokens_per_rank,
                group=group,
                place=Place(number, index),
            )
            layer.expert_parallel.copies = copies
    if aux_losses == "all":
        for layer in layers.values():
            compute_losses_over(layer, everyone)
    if "fsdp" in names:
        _shard(model, list(layers.values()), mesh, names, gradients, fsdp_options)
    setattr(model, TOLD, gradients)
    return model


def _check_fsdp(model: nn.Module, options: dict[str, Any], names: tuple[str, ...]) -> None:
    """TypeError, ValueError: FSDP2 has no such option, shards nothing here, or cannot shard this
    model."""
    from torch.distributed.fsdp import fully_shard

    known = [name for name in inspect.signature(fully_shard).parameters if name != "module"]
    for name in options:
        if name not in known or name == "mesh":
            raise TypeError(
                "parallelize must get arguments of its own, or those of fully_shard "
                f"({', '.join(n for n in known if n != 'mesh')}), got {name!r}"
            )
    if options and "fsdp" not in names:
        raise ValueError(f"mesh must have a dimension 'fsdp' for {', '.join(options)}, got {names}")
    if "fsdp" in names and isinstance(model, nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            "model must be a module that is called, which FSDP2 waits for, got a "
            f"{type(model).__name__}"
        )


def dimensions(mesh: Any) -> tuple[str, ...]:
    """The names of a mesh's dimensions.

    Raises:
        TypeError: it is no DeviceMesh.
        ValueError: a name is none of ``DIMENSIONS``, or ranks or dimensions come in an order that
            torch does not take.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, as init_device_mesh gives it, got {mesh!r}")
    names = mesh.mesh_dim_names or (("ep",) if mesh.ndim == 1 else ())
    if len(names) != mesh.ndim or not set(names) <= set(DIMENSIONS):
        raise ValueError(
            f"mesh must have dimensions with names among {DIMENSIONS}, got {names} for "
            f"{mesh.ndim} dimensions"
        )
    if {"dp", "fsdp"} <= set(names) and names.index("dp") > names.index("fsdp"):
        raise ValueError(f"mesh must have 'dp' before 'fsdp', as FSDP2 takes it, got {names}")
    along = names.index("ep") if "ep" in names else 0
    if not bool((mesh.mesh.diff(dim=along) > 0).all()):
        raise ValueError(
            f"mesh must have its ranks in ascending order along {names[along]!r}, as torch has "
            f"those of a process group, got {mesh.mesh.tolist()}"
        )
    return tuple(names)


def _shard(
    model: nn.Module,
    layers: list[Any],
    mesh: Any,
    names: tuple[str, ...],
    gradients: str,
    options: dict[str, Any],
) -> None:
    """FSDP2 around the experts, each block and the rest."""
    from torch.distributed.fsdp import fully_shard

    for_experts = mesh["dp", "fsdp"] if "dp" in names else mesh["fsdp"]
    for_others = _without_experts(mesh, names) if "ep" in names else for_experts

    # Else FSDP2 keeps the outermost weights gathered, and who reads or writes the sharded ones
    # between passes, as AWP does, would miss those that count.
    options = {"reshard_after_forward": True} | options
    sharded: list[Any] = []
    for layer in layers:
        for module in layer.expert_modules().values():
            sharded.append(fully_shard(module, mesh=for_experts, **options))
    # a block is gathered as a whole, but for the experts in it
    for module in (*blocks(model), model):
        sharded.append(fully_shard(module, mesh=for_others, **options))
    if gradients == "sum":
        for module in sharded:
            # gloo has no sums with a factor
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _without_experts(mesh: Any, names: tuple[str, ...]) -> Any:
    """The same ranks for weights that are no experts: "fsdp" and "ep" become one dimension."""
    from torch.distributed.device_mesh import DeviceMesh

    replicas = [name for name in ("dp",) if name in names]
    order = [names.index(name) for name in (*replicas, "fsdp", "ep")]
    ranks = mesh.mesh.permute(order).flatten(-2)
    both = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=(*replicas, "fsdp_ep"))
    _wait_as_long_as_all(both)
    return both


def _wait_as_long_as_all(mesh: Any) -> None:
    """Exchanges of FSDP2 and DTensor wait for a missing rank as long as those of all ranks."""
    for group in mesh.get_all_groups():
        wait_as_long_as_all(group)
