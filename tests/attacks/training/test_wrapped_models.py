"""Models inside DistributedDataParallel, FSDP2 and torch.compile: they train as plain ones do."""

import torch
from torch import nn
from training_toys import EPS
from two_processes import run_in_two_processes

from ironmoe.attacks.training import TRADES
from ironmoe.moe import MoE

IMPORTS = """
import torch._dynamo  # an optimizer imports it
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.training import AWP, EMA, PGDAT, TRADES, NonFiniteLoss, Standard
from ironmoe.moe import MoE, TopKRouter
from ironmoe.moe.distributed import in_step
"""

MODELS = """
def make(**options):
    torch.manual_seed(0)
    router = {"noise_std": 0, "importance_weight": 0, "load_weight": 0}
    moe = MoE(8, 6, 4, router=TopKRouter(8, 4, 2, **(router | options)))
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), moe, nn.Linear(8, 3))

def ddp(**options):
    return DistributedDataParallel(make(**options))

def fsdp(layers=(1, 2, 3), precision=None, **options):
    model, mesh = make(**options), init_device_mesh("cpu", (2,))
    shard = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(precision)}
    for layer in layers:
        fully_shard(model[layer], **shard)
    return fully_shard(model, **shard)

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def check(name, found, expected):
    for (place, want), got in zip(expected, found, strict=True):
        torch.testing.assert_close(whole(got), want, rtol=1e-5, atol=1e-7, msg=name + place)

images = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))
labels = torch.arange(4) % 3
half = slice(2 * rank, 2 * rank + 2)
"""

# A user's own loop: the first pass of the model is one of the inner attack.
LOOPS = """
NOISY = {"noise_std": 0.5, "importance_weight": 0.1, "load_weight": 0.1}
BY_PARTS = {"PGD-AT": lambda model: PGDAT(model, 0.1, steps=1, mode="train"),
            "TRADES": lambda model: TRADES(model, 0.1, steps=1),
            "standard": Standard}

def gradients(model, method, halves):
    model.zero_grad()
    for number in halves:
        torch.manual_seed(number)
        part = slice(2 * number, 2 * number + 2)
        (method(images[part], labels[part]) / len(halves)).backward()
    return [weight.grad for weight in model.parameters()]

for name, kind in BY_PARTS.items():
    alone = make(**NOISY)
    expected = gradients(alone, kind(alone), (0, 1))
    named = [(n, g) for (n, _), g in zip(alone.named_parameters(), expected)]
    for model in (ddp(**NOISY), fsdp(**NOISY), fsdp(layers=(), **NOISY)):
        for _ in range(2):
            check(name, gradients(model, kind(model), (rank,)), named)

# The attacks of an evaluation end with a pass without gradients, in which FSDP2 keeps the weights
# of its outermost module, and take part in training as before.
model = fsdp(layers=(2,), **NOISY)
try:
    PGD(model, eps=0.1, steps=1)(images[:2], labels[:2])
except ValueError as error:
    assert "with in_step(model):" in str(error)
else:
    raise AssertionError("processes would wait for each other")
with in_step(model):
    PGD(model, eps=0.1, steps=1)(images[:2], labels[:2])
evaluate(model, (images, labels), [PGD(model, eps=0.1, steps=2)])
method = Standard(model)
check("after PGD", gradients(model, method, (rank,)), named)
average = EMA(model)
with average.applied(), torch.no_grad():
    for weight in average._averages.values():
        weight.zero_()
with average.applied(), torch.no_grad():
    assert not model(images).any()
check("after EMA", gradients(model, method, (rank,)), named)
model = fsdp(precision=torch.bfloat16)
gradients(model, PGDAT(model, 0.1, steps=1), (rank,))

# A process looks at its own layers, while the others have passed.
model = DistributedDataParallel(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)))
method = Standard(model)
if rank:
    with torch.no_grad():
        model.module[2].weight.fill_(torch.nan)
    try:
        method(images, labels)
    except NonFiniteLoss as error:
        assert error.layer == "2"
    else:
        raise AssertionError("the loss was NaN")
else:
    method(images, labels)
"""

WEIGHTS = """
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


def test_two_processes_train_as_one(tmp_path):
    run_in_two_processes(MODELS + WEIGHTS + LOOPS, tmp_path, before=IMPORTS)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.moe, self.head = nn.Linear(4, 8), MoE(8, 4, 2, 1), nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.moe(self.embed(images[:, 0])).mean(1))


def test_a_compiled_model_is_compiled_once_and_trains_as_the_plain_one():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    images, labels = torch.rand(4, 1, 4, 4), torch.arange(4) % 3
    losses, compiled = {}, []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = Small()
        if compiles:
            model.compile(backend=backend)
        method = TRADES(model, EPS, steps=2, alarm=None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses[compiles] = []
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = method(images, labels)
            loss.backward()
            optimizer.step()
            losses[compiles].append(loss.item())
            compiled.append(len(graphs))
    assert losses[True] == losses[False]
    assert compiled == [0, 0, 0, 3, 3, 3]  # clean logits, a step of the attack, the outer pass
