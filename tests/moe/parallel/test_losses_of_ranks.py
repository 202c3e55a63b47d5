"""Training with experts on two processes: auxiliary losses of a rank or of all ranks, counts, steps
of an optimizer. Each is compared with one process that has all tokens."""

import pytest
from torch import nn
from two_processes import run_in_two_processes

from ironmoe.moe.layers.ranks import check_aux_losses

IMPORTS = """
import torch._dynamo.repro.after_dynamo  # torch.compile imports it
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint
from ironmoe.attacks.training import EMA
from ironmoe.moe import (
    Capacity, EnsembleRouter, MoE, TopKRouter, aux_loss_in_eval, collect_aux_loss,
    start_global_batch, update_selection_bias,
)
from ironmoe.moe.distributed import (
    ExchangeError, RanksDisagreeError, average_gradients, clip_grad_norm_, counted_traffic,
    parallelize,
)
from ironmoe.moe.exchange.sums import sum_over_ranks
"""
LOSSES = '''
torch.set_flush_denormal(True)
torch.set_default_dtype(torch.float64)
D, E, K, S = 6, 4, 2, 3
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))

def router(**options):
    off = {"importance_weight": 0, "load_weight": 0, "noise_std": 0}
    return TopKRouter(D, E, K, **off | {"balance_weight": 0.3} | options)

VMOE = {"noise_std": 1.0, "importance_weight": 0.5, "load_weight": 0.4, "z_weight": 0.1}
ROUTERS = {
    "V-MoE": lambda: router(**VMOE),
    "mixtral": lambda: router(balance="mixtral"),
    "deepseek": lambda: router(balance="deepseek", score="sigmoid", selection_bias=True),
    "sequences": lambda: router(balance="deepseek_sequence"),
    "global batch": lambda: router(balance="global_batch"),
    "ensemble": lambda: EnsembleRouter(D, E, 1, ensemble_size=2, importance_weight=0.5,
                                       load_weight=0.4, balance_weight=0.3, z_weight=0.1),
    "capacity": lambda: router(**VMOE),
}

def make(name):
    torch.manual_seed(1)
    capacity = Capacity(1.0, images_per_group=1) if name == "capacity" else None
    layer = MoE(D, 8, E, router=ROUTERS[name](), capacity=capacity)
    return nn.Sequential(nn.Linear(D, D), layer).double()

def images(number):
    """(B, S, D), their mask and the noise of their tokens."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, S, D, generator=generator)
    mask = torch.rand(3, S, generator=generator) < 0.7
    noise = torch.randn(3, S, E, generator=generator)
    return x[number], mask[number], noise[number]

def run(model, name, given, weight=1.0):
    """The loss of a pass: a sum over tokens, and the auxiliary loss."""
    x, mask, noise = given
    layer, members = model[1], 2 if name == "ensemble" else 1
    layer.router.noise = noise.flatten(0, 1)
    if members == 2:  # the same tokens for both members
        layer.router.noise = noise.flatten(0, 1).unflatten(-1, (2, -1)).permute(1, 0, 2)
        x, mask = torch.cat([x, x]), None if mask is None else torch.cat([mask, mask])
    y = layer(model[0](x), mask=mask)
    aux = collect_aux_loss(model)
    return y.square().sum() / 100, aux * weight

def grads(model):
    return {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for name, p in model.named_parameters()}

class LoadOfAll:
    """What the routers of two ranks have counted, for one that has the tokens of one of them."""
    def __init__(self, load):
        self.load = load
    def add(self, counts):
        return self.load

SPLITS = {"uneven": ([0, 1], [2]), "one rank empty": ([], [0, 1, 2])}

def compare(name, aux_losses, split, masked, gradients="mean"):
    parts = [images(numbers) for numbers in SPLITS[split]]
    whole = images([*SPLITS[split][0], *SPLITS[split][1]])
    if not masked:
        parts = [(x, None, noise) for x, _, noise in parts]
        whole = (whole[0], None, whole[2])
    alone = make(name)
    if aux_losses == "all":
        task, aux = run(alone, name, whole)
    else:
        task, _ = run(alone, name, whole)
        load = alone[1].router.global_load.counts
        if load is not None:
            alone[1].router.global_load = LoadOfAll(load.clone())
        aux = sum(run(alone, name, part)[1] for part in parts) / 2
    (task + aux).backward()

    model = parallelize(make(name), mesh, aux_losses=aux_losses, gradients=gradients)
    own, own_aux = run(model, name, parts[rank])
    (own * 2 + own_aux if gradients == "mean" else own + own_aux / 2).backward()
    average_gradients(model, mesh, gradients=gradients)
    where = f"{name}, {aux_losses}, {split}, masked={masked}, {gradients}: {{}}".format
    torch.testing.assert_close(grads(model), grads(alone), rtol=1e-12, atol=1e-12, msg=where)
    assert alone[1].router.weight.grad.abs().max() > 1e-6
    if aux_losses == "all":
        torch.testing.assert_close(own_aux, aux, rtol=1e-12, atol=0, msg=where)

for name in ROUTERS:
    for aux_losses in ("rank", "all"):
        for split in SPLITS:
            compare(name, aux_losses, split, masked=split == "uneven")
    compare(name, "all", "uneven", masked=False, gradients="sum")

def nobody_has_a_token():
    for name in ROUTERS:
        model = parallelize(make(name), mesh, aux_losses="all")
        task, aux = run(model, name, images([]))
        (task + aux).backward()
        assert aux == 0, name
        assert all(not p.grad.any() for n, p in model.named_parameters() if "fc" not in n), name

def second_derivatives():
    direction = torch.randn(E, D, generator=torch.Generator().manual_seed(3))
    def second(model, given):
        weight = model[1].router.weight
        (first,) = torch.autograd.grad(run(model, "V-MoE", given)[1], weight, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), weight)[0]
    want = second(make("V-MoE"), images([0, 1, 2]))
    got = second(parallelize(make("V-MoE"), mesh, aux_losses="all"), images(SPLITS["uneven"][rank]))
    dist.all_reduce(got)
    torch.testing.assert_close(got / 2, want, rtol=1e-11, atol=1e-11)

def other_passes_ask_no_rank():
    model = parallelize(make("V-MoE"), mesh, aux_losses="all").eval()
    alone = make("V-MoE").eval()
    given = images(SPLITS["uneven"][rank])
    with counted_traffic() as traffic, aux_loss_in_eval(model), aux_loss_in_eval(alone):
        assert run(model, "V-MoE", given)[1] == run(alone, "V-MoE", given)[1] > 0
    assert traffic.sums == 0

def compiled_code_stands_aside():
    group = parallelize(make("V-MoE"), mesh, aux_losses="all")[1].router.loss_ranks
    doubled = torch.compile(lambda x: 2 * sum_over_ranks(x + rank, group), backend="eager")
    assert doubled(torch.ones(2)).tolist() == [6, 6]

nobody_has_a_token()
second_derivatives()
other_passes_ask_no_rank()
compiled_code_stands_aside()
'''

TRAINING = """
def counted_once_a_step():
    counts = []
    for parallel in (True, False):
        model = make("deepseek").train()
        model = parallelize(model, mesh, aux_losses="all") if parallel else model
        layer = model[1]
        parts = [SPLITS["uneven"][rank]] if parallel else [[0, 1, 2]]
        for part in parts:
            x, mask, _ = images(part)
            y = checkpoint(lambda x: layer(x, mask=mask), model[0](x), use_reentrant=False)
            (y.square().sum() + collect_aux_loss(model)).backward()
            model.eval()(x)  # a pass that does not train
            model.train()
        assert layer.router.choices[:E].sum() == K * sum(int(images(p)[1].sum()) for p in parts)
        update_selection_bias(model, 0.1, all_processes=parallel)
        assert not layer.router.choices.any()
        counts.append(layer.router.selection_bias)
    assert counts[0].equal(counts[1]) and counts[0].any()

def the_load_of_a_global_batch():
    name = "global batch"
    model, alone = parallelize(make(name), mesh, aux_losses="all"), make(name)
    for batch in range(2):
        start_global_batch(model), start_global_batch(alone)
        for micro in (0, 1):
            run(model, name, images([micro + rank]))
            for each in (0, 1):
                run(alone, name, images([micro + each]))
    # the loads of two processes are summed, and both run the whole batch alone
    assert alone[1].router.global_load.counts.equal(2 * model[1].router.global_load.counts)

def steps(parallel):
    model = make("V-MoE")
    model = parallelize(model, mesh, aux_losses="all") if parallel else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    average, norms = EMA(model, 0.9), []
    for step in range(3):
        optimizer.zero_grad()
        task, aux = run(model, "V-MoE", images(SPLITS["uneven"][rank] if parallel else [0, 1, 2]))
        (task * 2 + aux if parallel else task + aux).backward()
        if parallel:
            average_gradients(model, mesh)
            norms.append(clip_grad_norm_(model, 0.3))
        else:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3))
        optimizer.step()
        average.update()
    tensors = dict(model.named_parameters()) | average.state_dict()
    whole = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}
    return whole | {"norms": torch.stack(norms)}

counted_once_a_step()
the_load_of_a_global_batch()
both, alone = steps(True), steps(False)
assert alone["norms"].max() > 0.3
torch.testing.assert_close(both, alone, rtol=1e-9, atol=1e-12)

try:
    parallelize(make("V-MoE"), mesh, aux_losses=("rank", "all")[rank])
    raise AssertionError("ranks that disagree were not found")
except RanksDisagreeError as error:
    for number, value in enumerate(("rank", "all")):
        assert f"aux_losses = {value!r} on rank {number}" in str(error), error

# the last one: without rank 1 no exchange works any more
model = parallelize(make("V-MoE"), mesh, aux_losses="all")
if rank == 1:
    os._exit(0)
try:
    run(model, "V-MoE", images([0]))
    raise AssertionError("nobody missed rank 1")
except ExchangeError as error:
    assert "a sum over ranks failed: rank 1 (process" in str(error), error
    assert "ended" in str(error), error
os._exit(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]))
"""


def test_losses_counts_and_steps_of_two_processes_are_those_of_one(tmp_path):
    """All cases in one pair of processes, because imports take most of the time."""
    run_in_two_processes(LOSSES + TRAINING, tmp_path, before=IMPORTS)


class OwnRouter(nn.Module):
    """A router that makes its loss itself."""


def test_a_router_with_losses_of_its_own_keeps_them_to_its_rank():
    layer = nn.Module()
    layer.router = OwnRouter()
    check_aux_losses(layer, "rank")
    with pytest.raises(ValueError, match=r"must be 'rank' .* got 'all' for a OwnRouter"):
        check_aux_losses(layer, "all")
    with pytest.raises(ValueError, match=r"aux_losses must be one of \('rank', 'all'\), got 'no'"):
        check_aux_losses(layer, "no")
