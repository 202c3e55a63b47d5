"""Checkpoints that one world of processes saves and another loads, against one process that never
saves. Run as a program by ``worlds``."""

import json
import os
import signal
import tracemalloc
from functools import partial
from pathlib import Path

import einops._torch_specific  # noqa: F401  what each process would import for itself
import safetensors.torch
import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from worlds import world

from ironmoe.moe import (
    CheckpointError,
    MoE,
    TopKRouter,
    VMoE,
    open_vmoe_checkpoint,
    read_vmoe_checkpoint,
    write_vmoe_checkpoint,
)
from ironmoe.moe.checkpoints import vmoe_data
from ironmoe.moe.distributed import (
    ExchangeError,
    average_gradients,
    load_checkpoint,
    load_weights,
    parallelize,
    save_checkpoint,
    save_weights,
)
from ironmoe.moe.parallel import weights_files
from ironmoe.moe.sharded import give_back_gathered, local_box, local_values, whole_tensor

D, E = 6, 8
# one process, then others: each loads what the one before has saved
CHAIN = [{}, {"ep": 2}, {"fsdp": 2, "ep": 2}, {"fsdp": 2}, {"dp": 2, "ep": 2}, {}]
EP, FSDP_EP = {"ep": 2}, {"fsdp": 2, "ep": 2}


def made():
    torch.manual_seed(0)
    router = TopKRouter(D, E, 2, noise_std=0, importance_weight=0, load_weight=0)
    moe = MoE(D, 5, E, router=router, bias=False)  # few tensors: DTensor thinks long about each
    first, last = nn.Linear(D, D, bias=False), nn.Linear(D, 3, bias=False)
    return nn.Sequential(first, moe, last).double()


def optimizer_of(model):
    """Two groups. eps is large, so that AdamW does not magnify rounding."""
    experts = {"params": list(model[1].parameters()), "lr": 2e-2}
    others = {"params": [*model[0].parameters(), *model[2].parameters()]}
    return torch.optim.AdamW([experts, others], lr=1e-2, weight_decay=0.1, eps=1e-4)


def mesh_of(sizes):
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def on(sizes):
    """(model, optimizer, mesh)."""
    model, mesh = made(), mesh_of(sizes) if sizes else None
    if sizes:
        parallelize(model, mesh)
    return model, optimizer_of(model), mesh


def step(number, model, optimizer, sizes, mesh):
    """On the whole batch, of which each rank has a part."""
    size, rank = (dist.get_world_size(), dist.get_rank()) if sizes else (1, 0)
    batch = torch.randn(16, D, generator=torch.Generator().manual_seed(number)).double()
    model(batch.chunk(size)[rank]).square().mean().backward()
    if sizes and "fsdp" not in sizes:
        average_gradients(model, mesh)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(batch)  # FSDP2 keeps what its outermost module gathers here


def assert_weights(model, expected, tolerance=0.0):
    """Each rank looks at what it holds."""
    for name, tensor in model.named_parameters():
        part = expected[name].detach()[tuple(slice(*axis) for axis in local_box(tensor))]
        held = local_values(tensor)
        assert held.shape == part.shape, name
        assert part.numel() == 0 or (held - part).abs().max() <= tolerance, name


def spoil(model):
    with torch.no_grad():
        for parameter in model.parameters():
            local_values(parameter).fill_(9)


def error_of(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{kind.__name__} expected")


# DCP


def train_alone():
    model, optimizer, _ = on({})
    for number in range(len(CHAIN)):
        step(number, model, optimizer, {}, None)
        torch.save(model.state_dict(), f"expected{number}")
        if number == 0:
            save_checkpoint("run", model, optimizer, numbers={"step": 0})


def go_on(number):
    """Load what the world before has saved, make a step, and save."""
    sizes, former = CHAIN[number], CHAIN[number - 1]
    model, optimizer, mesh = on(sizes)
    spoil(model)
    for group in optimizer.param_groups:
        group["lr"] = 9

    loaded = load_checkpoint("run", model, optimizer)
    assert loaded.numbers == {"step": number - 1}, loaded
    assert loaded.world_size == torch.Size(former.values()).numel(), loaded
    assert loaded.resharded, loaded
    before, now = loaded.world_size, torch.Size(sizes.values()).numel()
    assert (f"world_size: {before} there, {now} now" in loaded.changes) == (before != now), loaded
    assert loaded.changes[-1].startswith("meshes: "), loaded
    assert_weights(model, torch.load(f"expected{number - 1}"), 1e-12)

    step(number, model, optimizer, sizes, mesh)
    assert_weights(model, torch.load(f"expected{number}"), 1e-12)
    save_checkpoint("run", model, optimizer, numbers={"step": number})
    assert not load_checkpoint("run", model, optimizer).resharded


def save_and_be_killed():
    model, optimizer, mesh = on(EP)
    save_checkpoint("killed", model, optimizer, numbers={"save": 1})
    torch.save(whole_tensor(model[1].fc1.weight), f"first{dist.get_rank()}")
    step(0, model, optimizer, EP, mesh)

    write_data = dcp.FileSystemWriter.write_data

    def write_and_die(*arguments):
        write_data(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == 1:
        dcp.FileSystemWriter.write_data = write_and_die
    said = error_of(ExchangeError, lambda: save_checkpoint("killed", model, optimizer))
    assert "saving a checkpoint failed: rank 1 (process " in said, said
    assert len(list(Path("killed").glob("ironmoe-data-*"))) == 2


def load_after_the_kill():
    model, _, _ = on({})
    spoil(model)
    assert load_checkpoint("killed", model).numbers == {"save": 1}
    assert model[1].fc1.weight.equal(torch.load("first0"))
    save_checkpoint("killed", model)
    assert len(list(Path("killed").glob("ironmoe-data-*"))) == 1


def one_rank_fails():
    """Every rank hears of it, and the former checkpoint is there."""
    model, _, _ = on(EP)
    save_checkpoint("full", model)
    write_data = dcp.FileSystemWriter.write_data

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        dcp.FileSystemWriter.write_data = no_space
    said = error_of(CheckpointError, lambda: save_checkpoint("full", model))
    assert "rank 1: " in said, said
    assert "No space left" in said, said
    dcp.FileSystemWriter.write_data = write_data
    load_checkpoint("full", model)

    (damaged,) = Path("full").glob("ironmoe-data-1/__1_*")
    dist.barrier()
    if dist.get_rank() == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    said = error_of(CheckpointError, lambda: load_checkpoint("full", model))
    assert f"{damaged}: found checksum" in said, said

    # what the first rank alone could notice
    numbers = {"step": object()} if dist.get_rank() == 0 else None
    kind = TypeError if dist.get_rank() == 0 else CheckpointError
    said = error_of(kind, lambda: save_checkpoint("never", model, numbers=numbers))
    assert "Object of type object is not JSON serializable" in said, said
    assert dist.get_rank() == 0 or said.startswith("rank 0: TypeError: "), said
    other = optimizer_of(made()) if dist.get_rank() == 1 else None
    kind = ValueError if dist.get_rank() == 1 else CheckpointError
    said = error_of(kind, lambda: load_checkpoint("full", model, other))
    assert "parameters of the model alone" in said, said
    assert not Path("never").exists()


# Whole tensors in safetensors files


def save_whole_tensors():
    model, _, _ = on(FSDP_EP)
    save_weights("whole.safetensors", model)
    save_weights("parts.safetensors", model, max_file_bytes=2000)
    expected = made().state_dict()
    for file in ("whole.safetensors", "parts.safetensors"):
        spoil(model)
        load_weights(file, model)
        assert_weights(model, expected)
    if dist.get_rank() > 0:
        return

    index = json.loads(Path("parts.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert not Path("parts.safetensors").exists()
    for names in (["whole.safetensors"], files):
        read = {n: t for name in names for n, t in safetensors.torch.load_file(name).items()}
        assert read.keys() == expected.keys()
        assert all(read[name].equal(expected[name]) for name in read)


def save_weights_and_be_killed(killed):
    """One rank ends when the other one needs it for the experts of the second layer."""
    model, _, _ = on(EP)
    save_weights("kept.safetensors", model)
    spoil(model)
    whole = weights_files._whole

    def whole_or_end(tensor):
        if dist.get_rank() == killed and tensor.shape == model[1].fc2.weight.shape:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(tensor)

    weights_files._whole = whole_or_end
    said = error_of(ExchangeError, lambda: save_weights("kept.safetensors", model))
    assert f"gathering weights failed: rank {killed} (process " in said, said


def load_weights_after_the_kill():
    model = made()
    spoil(model)
    load_weights("kept.safetensors", model)
    assert_weights(model, made().state_dict())
    save_weights("kept.safetensors", model)
    assert [file.name for file in Path().glob("*kept*")] == ["kept.safetensors"]


def load_whole_tensors():
    """Into a model that never had whole weights; each rank reads what it holds, and no more."""
    with torch.device("meta"):
        model = made()
    parallelize(model, mesh_of(EP))
    model.to_empty(device="cpu")
    spoil(model)
    read, part = [], weights_files._part

    def counted(*arguments):
        read.append(part(*arguments).nbytes)
        return part(*arguments)

    weights_files._part = counted
    load_weights("whole.safetensors", model)
    assert_weights(model, made().state_dict())
    held = sum(local_values(parameter).nbytes for parameter in model.parameters())
    assert sum(read) == held < 0.7 * sum(parameter.nbytes for parameter in made().parameters())


# Checkpoints of the official code

ARGUMENTS = {
    "image_size": 8,
    "patch_size": 4,
    "dim": 96,
    "depth": 3,
    "heads": 4,
    "mlp_dim": 96,
    "num_classes": 3,
    "moe_layers": [1, 2],
    "num_experts": E,
    "top_k": 2,
    "expert_dim": 768,
    "classifier": "map",
}


def write_official():
    torch.manual_seed(1)
    model = VMoE(**ARGUMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    write_vmoe_checkpoint("official", model.to_jax(), shards=3, chunk_bytes=700_000)


def read_official(sizes):
    """A rank never holds more arrays than its share of one leaf and a few rows of a file."""
    vmoe_data._BLOCK = 1 << 14
    mesh = mesh_of(sizes)
    whole = VMoE.from_jax(read_vmoe_checkpoint("official"), top_k=2)
    stored = open_vmoe_checkpoint("official")
    model = VMoE.from_jax(stored, top_k=2, shard=lambda model: parallelize(model, mesh))
    expected = dict(whole.named_parameters())
    assert_weights(model, expected)
    arrays = whole.to_jax()
    assert all((array == arrays[name]).all() for name, array in model.to_jax().items())

    spoil(model)
    with torch.no_grad():
        model(torch.rand(1, 3, 8, 8))  # FSDP2 keeps what its outermost module gathers here
    tracemalloc.start()
    model.load_jax(open_vmoe_checkpoint("official"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    give_back_gathered(model)
    assert_weights(model, expected)

    # one kernel of all experts; the bytes of one expert, and its numbers
    leaf, expert = 4 * E * 96 * 768, 2 * 4 * 96 * 768
    share = max(local_values(parameter).nbytes for parameter in model.parameters())
    assert share * dist.get_world_size() == leaf
    assert peak < share + expert + 300_000 < leaf, (peak, share, leaf)


def main():
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    world(1, train_alone, write_official)
    world(2, partial(go_on, 1))
    world(4, partial(go_on, 2), save_whole_tensors, partial(read_official, FSDP_EP))
    world(2, partial(go_on, 3), one_rank_fails, load_whole_tensors, partial(read_official, EP))
    world(4, partial(go_on, 4))
    world(1, partial(go_on, 5))
    world(2, save_and_be_killed, exits=[0, -signal.SIGKILL])
    world(1, load_after_the_kill)
    for killed in (0, 1):
        exits = [-signal.SIGKILL * (rank == killed) for rank in range(2)]
        world(2, partial(save_weights_and_be_killed, killed), exits=exits)
        world(1, load_weights_after_the_kill)


if __name__ == "__main__":
    main()
