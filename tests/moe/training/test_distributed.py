"""Training in two processes: DistributedDataParallel and FSDP2, against one process on the whole
batch."""

from two_processes import run_in_two_processes

IMPORTS = """
import torch._dynamo  # DistributedDataParallel imports it
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from ironmoe.moe import MoE, SoftMoE, TopKRouter, collect_aux_loss, update_selection_bias
"""
PROGRAM = '''
D, E = 8, 4

def make(**options):
    """Losses are off: a balance loss of half a batch is not half that of the whole one."""
    torch.manual_seed(0)
    router = {"noise_std": 0, "importance_weight": 0, "load_weight": 0, "selection_bias": True}
    return nn.Sequential(
        nn.Linear(D, D),
        MoE(D, 16, E, router=TopKRouter(D, E, 2, **router), **options),
        SoftMoE(D, 16, E, 2),
        nn.Linear(D, 3),
    )

def batch(of):
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(of))

def gradients(model):
    return {n.replace("module.", ""): p.grad.full_tensor() if hasattr(p.grad, "full_tensor")
            else p.grad for n, p in model.named_parameters()}

def compare(model, reference, tolerance=1e-6, synchronised=lambda name: True):
    model(batch(rank)).square().mean().backward()
    for half in range(2):
        (reference(batch(half)).square().mean() / 2).backward()
    for (name, got), want in zip(gradients(model).items(), gradients(reference).values()):
        if not synchronised(name):
            dist.all_reduce(got)
            got = got / 2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=name)

def ddp_counts():
    model = DistributedDataParallel(make())  # buffers are broadcast before every pass
    router = model.module[1].router
    for part in range(2):  # two passes a step
        model(batch(10 * rank + part)).sum().backward()
    assert router.choices.sum() == 2 * 10 * 2, router.choices
    summed = router.choices.clone()
    dist.all_reduce(summed)
    alone = make()
    for part in (0, 1, 10, 11):
        alone(batch(part))
    assert summed.equal(alone[1].router.choices)
    update_selection_bias(model, 1e-2, all_processes=True)
    assert not router.choices.any()
    alone[1].router.update_selection_bias(1e-2)
    assert router.selection_bias.equal(alone[1].router.selection_bias)
    model(batch(3))
    assert router.selection_bias.equal(alone[1].router.selection_bias)

def ddp_gradients():
    compare(DistributedDataParallel(make()), make())

def ddp_checkpointed_losses():
    class Net(nn.Module):
        def __init__(self, checkpointed):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.moe = nn.Linear(D, D), MoE(D, 16, E)
            self.checkpointed = checkpointed
        def forward(self, x):
            x = self.first(x)
            if not self.checkpointed:
                return self.moe(x)
            return checkpoint(self.moe, x, use_reentrant=False)
    results = []
    for checkpointed in (False, True):
        net = DistributedDataParallel(Net(checkpointed))
        torch.manual_seed(1)
        y = net(batch(rank))
        loss = collect_aux_loss(net)
        (y.square().mean() + loss).backward()
        results.append([loss, *gradients(net).values()])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other)

def sharded(kind):
    mesh = init_device_mesh("cpu", (2,))
    precision = kind == "mixed precision"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision else None)
    model = make(recompute=kind == "recomputed")
    targets = {"experts alone": [model[1].fc1, model[1].fc2, model[2].fc1, model[2].fc2],
               "layers": [model[1], model[2]]}
    for module in targets.get(kind, targets["experts alone"] + [*model, model]):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    shards = kind in ("experts alone", "layers")
    own = {"experts alone": ("fc1", "fc2"), "layers": ("1.", "2.")}.get(kind, ("",))
    compare(model, make(), 0.05 if precision else 1e-5,
            lambda name: any(part in name if part else True for part in own))
    bias = model[1].router.selection_bias
    assert bias.dtype == torch.float32 and model[1].router.choices.sum() == 20

for run in (ddp_counts, ddp_gradients, ddp_checkpointed_losses):
    run()
    dist.barrier()
for kind in ("experts alone", "layers", "whole", "recomputed", "mixed precision"):
    sharded(kind)
    dist.barrier()
'''


def test_two_processes_train_as_one(tmp_path):
    """All cases in one pair of processes, because imports take most of the time."""
    run_in_two_processes(PROGRAM, tmp_path, before=IMPORTS)
