"""Perturbed and averaged weights in two processes, against one process on the whole batch."""

from two_processes import run_in_two_processes

PROGRAM = """
import copy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from ironmoe.attacks.training import AWP, EMA, PGDAT, Standard
from ironmoe.moe import MoE, TopKRouter

def make():
    torch.manual_seed(0)
    router = {"noise_std": 0, "importance_weight": 0, "load_weight": 0}
    moe = MoE(8, 6, 4, router=TopKRouter(8, 4, 2, **router))
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), moe, nn.Linear(8, 3))

def ddp():
    return DistributedDataParallel(make())

def fsdp():
    model, mesh = make(), init_device_mesh("cpu", (2,))
    for layer in (model[1], model[2], model[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def check(name, found, expected):
    for (place, want), got in zip(expected, found, strict=True):
        torch.testing.assert_close(whole(got), want, rtol=1e-5, atol=1e-7, msg=name + place)

images = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
labels = torch.arange(4) % 3
half = slice(2 * rank, 2 * rank + 2)

def step(model, x, y):
    # The inner attack has a fixed start, so that halves of a batch move as the whole one does.
    method = AWP(PGDAT(model, 0.1, steps=2, start="clean"), gamma=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema = EMA(model)
    before = [whole(w).clone() for w in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = method(x, y)
        moved = [not whole(w).equal(b) for w, b in zip(model.parameters(), before)]
        loss.backward()
        optimizer.step()
        ema.update()
    assert any(moved)
    at_w = [whole(w).clone() for w in model.parameters()]
    method(x, y).backward()
    assert all(whole(w).equal(b) for w, b in zip(model.parameters(), at_w))
    return method, ema

def compare(model):
    method, ema = step(model, images[half], labels[half])
    check("weight ", model.parameters(), alone.named_parameters())
    check("grad ", [w.grad for w in model.parameters()],
          [(n, w.grad) for n, w in alone.named_parameters()])
    expected = {n: v for n, v in reference.state_dict().items() if n != "updates"}
    check("average ", [v for n, v in ema.state_dict().items() if n != "updates"], expected.items())

    kept = [whole(w).clone() for w in model.parameters()]
    with ema.applied():
        found = [whole(w).clone() for w in model.parameters()]
    check("applied ", found, expected.items())
    assert all(whole(w).equal(b) for w, b in zip(model.parameters(), kept))
    plain = make()
    ema.copy_to(plain)
    check("copied ", plain.parameters(), expected.items())
    later = EMA(model)
    later.load_state_dict(ema.state_dict())
    check("loaded ", [v for n, v in later.state_dict().items() if n != "updates"], expected.items())

alone = make()
method, reference = step(alone, images, labels)
compare(ddp())
compare(fsdp())
"""


def test_awp_and_ema_are_those_of_one_process(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path)
