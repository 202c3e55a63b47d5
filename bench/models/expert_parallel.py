"""``--expert-parallel N``: the experts of a loaded model, shared out over processes."""

import torch
from torch import nn

from ironmoe.bench.common.processes import number_started
from ironmoe.bench.common.user_error import UserError
from ironmoe.moe import huggingface
from ironmoe.moe.adapters.huggingface_ranks import patched_experts
from ironmoe.moe.distributed import parallelize
from ironmoe.moe.parallel.layers import expert_layers

OPTION = "--expert-parallel"


def check_processes(ranks: int) -> None:
    """UserError: the number of processes that were started is no multiple of ``ranks``."""
    started = number_started()
    if started % ranks:
        raise UserError(
            f"{OPTION} must divide the number of processes, got {ranks} with {started}: start the "
            f"command with torchrun --nproc-per-node {ranks}, or a multiple of it"
        )


def prepare_experts(model: nn.Module, name: str, ranks: int) -> None:
    """Make the model one whose experts can be shared out over ``ranks`` processes.

    UserError: it has no experts, a layer has a number of them that ``ranks`` does not divide, or
    ironmoe's kernels cannot run them. name: of the model, for people.
    """
    if ranks == 1:
        return
    layers = expert_layers(model)
    if not layers:
        raise UserError(
            f"{OPTION} {ranks} must come with a model that has layers with experts, got {name}, "
            "which has none"
        )
    for layer, module in layers.items():
        if module.num_experts % ranks:
            raise UserError(
                f"{OPTION} must divide the number of experts of each layer, got {ranks} with "
                f"{module.num_experts} experts in {layer} of {name}"
            )
    try:
        run_on_kernels(model)
        for module in layers.values():
            module.expert_modules()
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{OPTION} {ranks} cannot share out the experts of {name}: {error}; leave it out"
        ) from error


def run_on_kernels(model: nn.Module) -> None:
    """Let the experts of a Hugging Face model run on ironmoe's kernels, which know of other ranks.
    Outputs stay the same to rounding. A model without such experts stays as it is.

    ImportError, ValueError: as ``ironmoe.moe.huggingface.patch``.
    """
    if patched_experts(model):
        huggingface.patch(model)


def share_out_experts(model: nn.Module, ranks: int, device: torch.device, world: int) -> None:
    """Let each ``ranks`` neighbouring processes of all hold the experts of the model together. The
    rest comes to the device afterwards. All processes must call it."""
    if ranks > 1:
        from torch.distributed.device_mesh import init_device_mesh

        shape = (world // ranks, ranks)
        parallelize(model, init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ep")))
        model.to(device)


def told_groups(world: int, ranks: int) -> str:
    """ "4 processes in 2 groups, each of which shares the experts out"; empty without groups."""
    if ranks == 1:
        return ""
    count = world // ranks
    groups = "1 group, which shares" if count == 1 else f"{count} groups, each of which shares"
    return f"{world} processes in {groups} the experts out"
