"""Ranks that differ, and ranks that end: the others say which, and nobody waits for ever."""

import os
import signal
import time
from datetime import timedelta

import meshes_on_ranks
import torch
import torch.distributed as dist
from layers_on_ranks import D, E, F, images, made
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ironmoe.moe import MoE
from ironmoe.moe.distributed import ExchangeError, RanksDisagreeError, naming_ranks, parallelize
from ironmoe.moe.exchange.group import timeout_of, timeout_of_all


def raised(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} expected")


def ranks_that_disagree(mesh, rank):
    """Every rank raises, and the next pass is right again."""
    world = mesh.size()
    layer = made("top 2").parallelize(mesh)
    x = images(rank, [2] * world)

    given = x.detach() if rank == 1 else x
    said = raised(RanksDisagreeError, lambda: layer(given))
    assert "requires_grad" in said, said
    assert "rank 1" in said, said

    single = made("top 2", torch.float32).parallelize(mesh)
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
        said = raised(RanksDisagreeError, lambda: single(x.float()))
    assert "bfloat16" in said, said

    if rank == 1:
        for weight in (*layer.fc1.parameters(), *layer.fc2.parameters()):
            weight.requires_grad_(False)
    said = raised(RanksDisagreeError, lambda: layer(x))
    assert "weights with requires_grad" in said, said
    for weight in layer.parameters():
        weight.requires_grad_(True)
    layer(x).sum().backward()

    first, second = (made("top 2").parallelize(mesh) for _ in range(2))
    said = raised(RanksDisagreeError, lambda: (second if rank == 1 else first)(x))
    assert "model" in said and "rank 1" in said, said

    other = MoE(D, F + (rank == 1), E, 2)
    said = raised(RanksDisagreeError, lambda: other.parallelize(mesh))
    assert "rank 1" in said, said
    assert f"fc1.weight of shape ({E}, {F + 1}, {D})" in said, said

    def model(classes=3, layers=2, meta=False):
        with torch.device("meta" if meta else "cpu"):
            experts = [MoE(D, F, E, 2) for _ in range(layers)]
            return nn.Sequential(*experts, nn.Linear(D, classes))

    others = (
        (model(classes=3 + 2 * (rank == 1)), "2.weight of shape (5, 8)"),
        (model(layers=2 - (rank == 1)), "layers with experts = ['0']"),
        (model(meta=rank == 1), "on the meta device"),
        (nn.Linear(D, D) if rank == 1 else model(), "class = 'Linear'"),
    )
    for each, words in others:
        said = raised(RanksDisagreeError, lambda each=each: parallelize(each, mesh))
        assert words in said, said

    uneven = nn.Sequential(MoE(D, F, E, 2), MoE(D, F, 3, 2))
    said = raised(ValueError, lambda: parallelize(uneven, mesh))
    assert "num_experts = 3" in said and uneven[0].expert_parallel is None, said


def meshes_that_are_refused(_, rank):
    """They would give copies of a weight other gradients, or rows to the wrong experts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    said = raised(ValueError, lambda: parallelize(made("top 2"), mesh["ep"]))
    assert "all 4 ranks" in said, said
    crossed = DeviceMesh("cpu", [[3, 1], [0, 2]], mesh_dim_names=("dp", "ep"))
    said = raised(ValueError, lambda: parallelize(made("top 2"), crossed))
    assert "ascending" in said, said
    turned = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "dp"))
    said = raised(ValueError, lambda: parallelize(made("top 2"), turned))
    assert "'dp' before 'fsdp'" in said, said


def timeouts_of_groups(_, rank):
    """Those that somebody has chosen stay."""
    before = timeout_of_all()
    dist.group.WORLD.set_timeout(timedelta(seconds=50))
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "fsdp", "ep"))
    model = parallelize(meshes_on_ranks.made(), mesh)
    both = model.head.weight.device_mesh  # has "fsdp" and "ep" as one
    groups = {*mesh.get_all_groups(), *both.get_all_groups()}
    assert len(groups) > 3, groups
    chosen, layer = pair(rank), made("top 2")
    layer.parallelize(chosen)
    for group in groups:
        assert timeout_of(group) == timedelta(seconds=50), group
    dist.group.WORLD.set_timeout(before)
    assert timeout_of(chosen.get_group()) == timedelta(seconds=30)


def pair(rank):
    """A mesh of two of four ranks: (0, 1) or (2, 3)."""
    pairs = [dist.new_group(two, timeout=timedelta(seconds=30)) for two in ([0, 1], [2, 3])]
    return DeviceMesh.from_group(pairs[rank // 2], "cpu", mesh_dim_names=("ep",))


def another_number_of_passes(_, rank):
    """Groups of a mesh wait as long as ``init_process_group`` was told."""
    before = timeout_of_all()
    dist.group.WORLD.set_timeout(timedelta(seconds=2))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    layer = parallelize(made("top 2"), mesh)
    dist.group.WORLD.set_timeout(before)
    x = images(rank % 2, [1, 1])
    layer(x)
    if rank in (0, 2):
        said = raised(ExchangeError, lambda: layer(x))
        assert f"rank {rank + 1}" in said, said
    else:
        time.sleep(5)  # longer than the timeout


def a_rank_that_is_killed(_, rank):
    """Rank 3 ends in a forward pass and rank 1 in a backward pass. Nothing comes after this."""
    layer = made("shared").parallelize(pair(rank))
    x = images(rank % 2, [2, 2])
    if rank == 3:
        layer.router.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    y = None
    if rank in (2, 3):
        said = raised(ExchangeError, lambda: layer(x))
    else:
        y = layer(x)
        if rank == 1:
            y.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        said = raised(ExchangeError, lambda: y.sum().backward())
    assert f"rank {rank + 1} (process " in said, said
    assert "ended" in said, said


def a_rank_that_is_killed_under_fsdp(_, rank):
    """Rank 1 ends in a backward pass; the exchange that fails is one of FSDP2. Nothing comes after
    this."""

    def another_error():
        with naming_ranks():
            return torch.ones(2) @ torch.ones(3)

    said = raised(RuntimeError, another_error)
    assert "size" in said and "rank" not in said, said

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "ep"))
    model = parallelize(meshes_on_ranks.made(), mesh)
    y = model(meshes_on_ranks.batch(rank, 0))
    if rank == 1:
        y.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))

    def backward():
        with naming_ranks():
            y.sum().backward()

    said = raised(ExchangeError, backward)
    assert "rank 1 (process " in said, said
    assert "ended" in said, said


CASES = (ranks_that_disagree, meshes_that_are_refused, timeouts_of_groups, another_number_of_passes)
