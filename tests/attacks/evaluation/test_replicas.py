"""Evaluations by two replicas of two processes each, which share the weights of a model: the
verdicts of one process, whichever replica looks at an image."""

from pathlib import Path

from two_processes import run_in_processes

SUPPORT = Path(__file__).parents[2] / "support"
IMPORTS = """
sys.path.append(sys.argv[1])
import copy
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor
from torch.distributed.device_mesh import init_device_mesh
from toys import blobs, vmoe
from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.evaluation.sharding import current_shard
from ironmoe.moe.distributed import parallelize
from ironmoe.moe.parallel import one_copy

IMAGES, LABELS = blobs(9)
IMAGES = IMAGES.double()

def run(model, **options):
    attacks = {"pgd": PGD(model, 0.025, steps=2, restarts=2)}
    options = {"batch_size": 2, "checks": False} | options
    return evaluate(model, (IMAGES, LABELS), attacks, **options)

PLAIN = vmoe(IMAGES.float(), LABELS)
ALONE = run(PLAIN)
"""
PROGRAM = """
FIELDS = ("clean_correct", "fell", "found", "decided", "prediction", "passed", "steps", "examples")

def shared(**sizes):
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return parallelize(copy.deepcopy(PLAIN), mesh)

def compare(found):
    assert found.complete
    want, got = ALONE.attacks["pgd"], found.attacks["pgd"]
    for field in FIELDS:
        assert getattr(got, field).equal(getattr(want, field)), field

def verdicts(model):
    shard = current_shard(model)
    assert (shard.rank, shard.world) == (rank // 2, 2), shard
    compare(run(model))

def budgets_and_journals(model):
    # a budget is of all replicas together, and what they have not decided comes later
    few = run(model, max_forwards=10, journal="kept")
    again = run(model, max_forwards=10)
    assert not few.complete and few.attacks["pgd"].forwards <= 10 + 2 * 4, few.attacks["pgd"]
    assert again.attacks["pgd"].decided.equal(few.attacks["pgd"].decided)
    compare(run(model, journal="kept"))
    compare(run(PLAIN, journal="kept", max_forwards=0))  # by four replicas, which find all done

experts = shared(dp=2, ep=2)
for work in (verdicts, budgets_and_journals):
    work(experts)
    dist.barrier()
verdicts(shared(dp=2, fsdp=2, ep=1))

# with eight processes a copy may lie over two dimensions of the mesh, which have no group together
mine = tuple(range(rank // 2 * 2, rank // 2 * 2 + 2))
one_copy._ranks_of_weights = lambda models: [(mine, None)]
group = one_copy.group_of_one_copy([])
number = torch.tensor(rank)
group.sum(number)
assert number == sum(mine) and group.global_rank(group.rank) == rank
assert one_copy.group_of_one_copy([]) is group
"""


def test_two_replicas_find_what_one_process_finds(tmp_path):
    run_in_processes(4, PROGRAM, tmp_path, str(SUPPORT), before=IMPORTS)
