"""Checkpoints that one world of processes saves and another loads, against one process that never
saves."""

from worlds import run_worlds

IMPORTS = """
import json, tracemalloc, warnings
import torch.distributed.checkpoint as dcp
from pathlib import Path
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
import torch.distributed.fsdp, torch.distributed.tensor, safetensors.torch, msgpack
import torch.distributed.checkpoint.state_dict, torch._dynamo, einops._torch_specific
from ironmoe.moe import *
from ironmoe.moe.checkpoints import vmoe_data
from ironmoe.moe.distributed import *
from ironmoe.moe.parallel import weights_files
from ironmoe.moe.sharded import local_values, whole_tensor
"""
PROGRAM = '''
D, E, STEPS = 6, 8, 6

def make():
    torch.manual_seed(0)
    router = {"noise_std": 0, "importance_weight": 0, "load_weight": 0}
    moe = MoE(D, 5, E, router=TopKRouter(D, E, 2, **router))
    return nn.Sequential(nn.Linear(D, D), moe, nn.Linear(D, 3)).double()

def optimizer_of(model):
    groups = [{"params": list(model[1].parameters()), "lr": 2e-2},
              {"params": [*model[0].parameters(), *model[2].parameters()]}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1, eps=1e-4)

def mesh_of(sizes):
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))

def on(sizes):
    model = make()
    mesh = mesh_of(sizes) if sizes else None
    if sizes:
        parallelize(model, mesh)
    return model, optimizer_of(model), mesh

def step(number, model, optimizer, sizes, mesh):
    """On the whole batch, of which each rank has a part."""
    world_size = dist.get_world_size() if sizes else 1
    rank = dist.get_rank() if sizes else 0
    batch = torch.randn(16, D, generator=torch.Generator().manual_seed(number)).double()
    model(batch.chunk(world_size)[rank]).square().mean().backward()
    if sizes and "fsdp" not in sizes:
        average_gradients(model, mesh)
    optimizer.step()
    optimizer.zero_grad()

def assert_weights(model, expected, tolerance=1e-12):
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(whole_tensor(tensor), expected[name], rtol=0, atol=tolerance,
                                   msg=lambda words: f"{name}: {words}")

def train_alone(rank):
    model, optimizer, _ = on({})
    for number in range(STEPS):
        step(number, model, optimizer, {}, None)
        torch.save(model.state_dict(), f"expected{number}")
        if number == 0:
            save_checkpoint("run", model, optimizer, numbers={"step": 0})

def go_on(rank, number, sizes, former):
    model, optimizer, mesh = on(sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            local_values(parameter).fill_(9)
    for group in optimizer.param_groups:
        group["lr"] = 9
    loaded = load_checkpoint("run", model, optimizer)
    assert loaded.numbers == {"step": number - 1}, loaded
    assert loaded.world_size == torch.Size(former.values()).numel() and loaded.resharded, loaded
    assert_weights(model, torch.load(f"expected{number - 1}"))
    step(number, model, optimizer, sizes, mesh)
    assert_weights(model, torch.load(f"expected{number}"))
    save_checkpoint("run", model, optimizer, numbers={"step": number})
    assert not load_checkpoint("run", model, optimizer).resharded

def reshard():
    """1 to 2 to 4 to 2 to 4 to 1 processes."""
    world(1, train_alone)
    chain = [{}, {"ep": 2}, {"fsdp": 2, "ep": 2}, {"fsdp": 2}, {"dp": 2, "ep": 2}, {}]
    for number in range(1, STEPS):
        sizes = chain[number]
        world(torch.Size(sizes.values()).numel(), go_on, number, sizes, chain[number - 1])

def save_and_be_killed(rank):
    model, optimizer, mesh = on({"ep": 2})
    save_checkpoint("killed", model, optimizer, numbers={"save": 1})
    torch.save(whole_tensor(model[1].fc1.weight), f"first{rank}")
    step(0, model, optimizer, {"ep": 2}, mesh)
    if rank == 1:
        write_data = dcp.FileSystemWriter.write_data
        def write_and_die(*arguments):
            write_data(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        dcp.FileSystemWriter.write_data = write_and_die
    try:
        save_checkpoint("killed", model, optimizer, numbers={"save": 2})
    except ExchangeError as error:
        assert "saving a checkpoint failed" in str(error) and "rank 1 (" in str(error), error
        assert len(list(Path("killed").glob("ironmoe-data-*"))) == 2
    else:
        raise AssertionError("the save of a world with a dead rank did not fail")

def load_after_the_kill(rank):
    model, optimizer, _ = on({})
    weight = model[1].fc1.weight
    weight.data.zero_()
    assert load_checkpoint("killed", model).numbers == {"save": 1}
    assert weight.equal(torch.load("first0"))
    save_checkpoint("killed", model, optimizer)
    assert len(list(Path("killed").glob("ironmoe-data-*"))) == 1

def one_rank_cannot_write(rank):
    model, optimizer, _ = on({"ep": 2})
    save_checkpoint("full", model)
    def no_space(*arguments):
        raise OSError(28, "No space left on device")
    if rank == 1:
        dcp.FileSystemWriter.write_data = no_space
    try:
        save_checkpoint("full", model)
    except CheckpointError as error:
        assert "rank 1" in str(error) and "No space left" in str(error), error
    load_checkpoint("full", model)
    damaged, = Path("full").glob("ironmoe-data-1/__1_*")
    dist.barrier()
    if rank == 0:
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    try:
        load_checkpoint("full", model)
    except CheckpointError as error:  # the same words in both
        assert f"{damaged}: found checksum" in str(error), error
    else:
        raise AssertionError("a changed bit was not seen")

def save_whole_tensors(rank):
    model, _, _ = on({"fsdp": 2, "ep": 2})
    save_weights("whole.safetensors", model)
    save_weights("parts.safetensors", model, max_file_bytes=2000)
    dist.barrier()
    expected = {name: t for name, t in make().state_dict().items()}
    for file in ("whole.safetensors", "parts.safetensors"):
        for p in model.parameters():
            local_values(p).zero_()
        load_weights(file, model)
        assert_weights(model, expected, 0)
    if rank == 0:
        read = safetensors.torch.load_file("whole.safetensors")
        assert read.keys() == expected.keys() and all(read[n].equal(expected[n]) for n in read)
        index = json.loads(Path("parts.safetensors.index.json").read_text())
        files = set(index["weight_map"].values())
        assert len(files) > 2 and not Path("parts.safetensors").exists()
        read = {n: t for f in files for n, t in safetensors.torch.load_file(f).items()}
        assert read.keys() == expected.keys() and all(read[n].equal(expected[n]) for n in read)

def load_whole_tensors(rank):
    """Into a model that never had whole weights; each rank reads what it holds, and no more."""
    with torch.device("meta"):
        model = make()
    parallelize(model, mesh_of({"ep": 2}))
    model.to_empty(device="cpu")
    read, part = [], weights_files._part
    def counted(*arguments):
        read.append(part(*arguments))
        return read[-1]
    weights_files._part = counted
    load_weights("whole.safetensors", model)
    assert_weights(model, make().state_dict(), 0)
    held = [local_values(parameter) for parameter in model.parameters()]
    assert sum(t.nbytes for t in read) == sum(t.nbytes for t in held)
    assert sum(t.nbytes for t in held) < 0.7 * sum(p.nbytes for p in make().parameters())

ARGUMENTS = dict(image_size=8, patch_size=4, dim=96, depth=3, heads=4, mlp_dim=96, num_classes=3,
                 moe_layers=[1, 2], num_experts=8, top_k=2, expert_dim=768, classifier="map")
OFFICIAL = "official"

def write_official(rank):
    torch.manual_seed(1)
    model = VMoE(**ARGUMENTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    write_vmoe_checkpoint(OFFICIAL, model.to_jax(), shards=3, chunk_bytes=700_000)

def read_official(rank, sizes):
    """A rank never holds more arrays than the share of one leaf, and a few rows of a file."""
    vmoe_data._BLOCK = 1 << 14
    mesh = mesh_of(sizes)
    whole = VMoE.from_jax(read_vmoe_checkpoint(OFFICIAL), top_k=2)
    stored = open_vmoe_checkpoint(OFFICIAL)
    model = VMoE.from_jax(stored, top_k=2, shard=lambda model: parallelize(model, mesh))
    expected = dict(whole.named_parameters())
    assert all(not p.is_meta for p in model.parameters())
    assert_weights(model, expected, 0)
    assert {n: a.tolist() for n, a in model.to_jax().items() if "bias" in n} == {
        n: a.tolist() for n, a in whole.to_jax().items() if "bias" in n}

    for parameter in model.parameters():
        local_values(parameter).zero_()
    tracemalloc.start()
    model.load_jax(open_vmoe_checkpoint(OFFICIAL))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_weights(model, expected, 0)
    experts = max(array.nbytes for array in stored.values())  # one kernel of one layer
    share = max(local_values(p).nbytes for p in model.parameters())
    assert share * dist.get_world_size() == experts
    row = experts // 8  # of one expert, read in bytes and in numbers
    assert peak < share + 2 * row + 300_000 < experts, (peak, share, experts)

reshard()
world(2, save_and_be_killed, exits=[0, -signal.SIGKILL])
world(1, load_after_the_kill)
world(2, one_rank_cannot_write)
world(4, save_whole_tensors)
world(2, load_whole_tensors)
world(1, write_official)
world(2, read_official, {"ep": 2})
world(4, read_official, {"fsdp": 2, "ep": 2})
'''


def test_what_one_world_saves_another_loads(tmp_path):
    """All cases in one program, because imports take most of the time."""
    run_worlds(PROGRAM, tmp_path, before=IMPORTS)
