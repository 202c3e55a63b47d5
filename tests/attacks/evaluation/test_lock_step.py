"""Evaluations of models whose weights are shared out over two processes: the verdicts of one."""

from two_processes import run_in_two_processes

IMPORTS = """
import copy, signal
from pathlib import Path
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from toys import blobs, vmoe
from ironmoe.attacks import (PGD, AutoAttack, Ensemble, FrozenRouting, StraightThrough,
                             UniversalPerturbation, certify, evaluate)
from ironmoe.attacks.engine import budget
from ironmoe.moe import Capacity
from ironmoe.moe.distributed import ExchangeError, RanksDisagreeError, in_step, parallelize

IMAGES, LABELS = blobs(13)
IMAGES = IMAGES.double()
EPS = 0.025  # some images fall

def changed(noise=0.0, capacity=None):
    # the fitted model with other weights, or a capacity
    model = copy.deepcopy(PLAIN)
    model.blocks[1].mlp.capacity = capacity
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn_like(weight)
    return model

def attacks(model):
    chain = AutoAttack(model, eps=EPS, version="custom",
                       attacks_to_run=["apgd-ce", "fab-t", "square"])
    chain.apgd.n_iter = chain.fab.n_iter = 2
    chain.fab.n_target_classes = 1
    chain.square.n_queries = 4
    return {"aa": chain, "frozen": PGD(model, EPS, steps=3, routing=FrozenRouting())}

def pgd(model, **options):
    return {"pgd": PGD(model, EPS, steps=3, restarts=2, **options)}

def run(model, chosen=attacks, **options):
    return evaluate(model, (IMAGES, LABELS), chosen(model), batch_size=8, **options)

def transferred(member):
    source = Ensemble([member, OTHER], "loss")
    return evaluate(OTHER, (IMAGES, LABELS), pgd(source), batch_size=8, checks=False,
                    search_model=source)

PLAIN = vmoe(IMAGES.float(), LABELS)
OTHER = changed(noise=0.02)
GROUPS = {size: changed(capacity=Capacity(0.7, images_per_group=size)) for size in (2, None)}
FEW = IMAGES[:3], LABELS[:3]
NOISE = {"sigma": 0.1, "selection": 8, "samples": 20}
ALONE = {
    "pgd": run(PLAIN, pgd, keep_adversarial=True, checks=False),
    "certified": certify(PLAIN, FEW, **NOISE),
    "universal": UniversalPerturbation(PLAIN, EPS, 1).fit(FEW),
    "transferred": transferred(PLAIN),
    "all": run(PLAIN, keep_adversarial=True),
    "few": run(PLAIN, max_forwards=200, checks=False, journal="resumed"),
    "groups": {size: run(model, pgd, checks=False) for size, model in GROUPS.items()},
}
"""
PROGRAM = '''
FIELDS = ("clean_correct", "fell", "found", "decided", "prediction", "passed", "steps", "examples")
EP = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
BOTH = init_device_mesh("cpu", (2, 1), mesh_dim_names=("fsdp", "ep"))

def shared(model=PLAIN, mesh=EP):
    return parallelize(copy.deepcopy(model), mesh)

def compare(found, wanted, counted=True):
    """counted: that one was made by one process; two that share the images make other numbers of
    passes."""
    assert found.complete == wanted.complete
    for name, want in wanted.attacks.items():
        got = found.attacks[name]
        for field in FIELDS:
            assert getattr(got, field).equal(getattr(want, field)), (name, field)
        passes = (got.forwards, got.backwards) == (want.forwards, want.backwards)
        assert passes or not counted, name
    if found.checks:
        of_each = [[(flag.name, flag.state) for flag in r.checks] for r in (found, wanted)]
        assert of_each[0] == of_each[1], of_each

def expert_parallel():
    told = []
    found = run(shared(), keep_adversarial=True, on_progress=told.append)
    compare(found, ALONE["all"])
    for name, want in ALONE["all"].attacks.items():
        # Both are computed in float64 and kept in float32. A step along the sign of a gradient
        # differs where the gradient is smaller than its rounding, which is one number in 10^12.
        torch.testing.assert_close(found.attacks[name].adversarial, want.adversarial)
    assert bool(told) == (rank == 0)
    assert not told or told[-1].decided == told[-1].total == 2 * len(IMAGES)

def fully_sharded():
    found = run(shared(mesh=BOTH), pgd, journal="kept", keep_adversarial="journal", checks=False)
    compare(found, ALONE["pgd"])
    final = found.attacks["pgd"].final(torch.arange(len(IMAGES)))  # read by each process
    torch.testing.assert_close(final, ALONE["pgd"].attacks["pgd"].adversarial)

def ensembles():
    """Of the models, one is shared out, and it is not the one that judges."""
    compare(transferred(shared()), ALONE["transferred"])

def whole_groups():
    for size, model in GROUPS.items():
        compare(run(shared(model), pgd, checks=False), ALONE["groups"][size])

def budgets():
    model = shared()
    assert not ALONE["few"].complete
    compare(run(model, max_forwards=200, checks=False), ALONE["few"])
    now = budget.time.monotonic
    for late in (0, 1):  # the clock of the first process counts
        budget.time.monotonic = lambda: now() + (1e6 if calls_left() < 0 and rank == late else 0)
        left = [10]
        def calls_left():
            left[0] -= 1
            return left[0]
        found = run(model, pgd, max_seconds=1000, checks=False)
        assert found.complete == (late == 1)
    budget.time.monotonic = now

def journals():
    """What one process began two go on with, and one finishes what two began."""
    model = shared()
    found = run(model, checks=False, journal="resumed")
    compare(found, ALONE["all"], counted=False)
    assert not Path("resumed/journal-1.jsonl").exists()

    few = run(model, max_forwards=150, checks=False, journal="begun", keep_adversarial="journal")
    assert not few.complete
    run(PLAIN, checks=False, journal="begun", keep_adversarial="journal")
    sharded = shared(mesh=BOTH)
    again = run(sharded, checks=False, journal="begun", keep_adversarial="journal",
                max_forwards=0)
    compare(again, ALONE["all"], counted=False)
    for name, want in ALONE["all"].attacks.items():
        final = again.attacks[name].final(torch.arange(len(IMAGES)))
        torch.testing.assert_close(final, want.adversarial)
    try:
        run(model, pgd, journal="begun", checks=False)
    except ValueError as error:
        assert "another" in str(error) and type(error).__name__ == "JournalError", error
    else:
        raise AssertionError("journal of other attacks")

class Random(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        logits = self.model(x)
        return logits + 0.3 * torch.randn_like(logits)

def random_models():
    """Every process has the same report, and the model is found random."""
    model = Random(shared())
    torch.manual_seed(rank)
    data = IMAGES[:3], LABELS[:3]
    found = evaluate(model, data, {"pgd": PGD(model, EPS, steps=1)}, batch_size=3)
    summary = found.attacks["pgd"]
    assert summary.passes == 64
    hits = [torch.empty_like(summary.hits) for _ in range(2)]
    dist.all_gather(hits, summary.hits)
    assert hits[0].equal(hits[1]) and (0 < hits[0]).any() and (hits[0] < 32).any()

def attacks_alone():
    model = shared()
    x, y = IMAGES[:5], LABELS[:5]
    for routing in (None, StraightThrough()):
        wanted = PGD(PLAIN, EPS, steps=3, routing=routing).run(x, y)
        with in_step(model):
            found = PGD(model, EPS, steps=3, routing=routing).run(x, y)
        assert found.success.equal(wanted.success)
        torch.testing.assert_close(found.adversarial, wanted.adversarial)

    def called(images):  # no module, and the block around says who shares the work
        return model(images)

    with in_step(model):
        compare(run(called, pgd, checks=False), ALONE["pgd"])
        certified = certify(model, FEW, **NOISE)
        universal = UniversalPerturbation(model, EPS, 1).fit(FEW)
        try:
            certify(model, FEW, journal="votes", **NOISE)
        except ValueError as error:
            assert "journal must be None" in str(error)
        else:
            raise AssertionError("journal of several processes")
    assert certified.certificates == ALONE["certified"].certificates
    torch.testing.assert_close(universal.perturbation, ALONE["universal"].perturbation)

def refused():
    model = shared()
    for call in (lambda: PGD(model, EPS, steps=2)(IMAGES[:2], LABELS[:2]),
                 lambda: PGD(model, EPS).run(IMAGES[:2], LABELS[:2]),
                 lambda: certify(model, (IMAGES, LABELS), sigma=0.1)):
        try:
            call()
        except ValueError as error:
            assert "in_step" in str(error) or "all of its weights" in str(error), error
        else:
            raise AssertionError("outside a block")
    for options, name in (({"seed": None}, "attacks"), ({"seed": rank}, "attacks")):
        try:
            run(model, lambda m: pgd(m, **options))
        except RanksDisagreeError as error:
            assert name in str(error) and f"on rank {rank}" in str(error), error
        else:
            raise AssertionError(name)
    try:
        evaluate(model, (IMAGES + 1e-3 * rank, LABELS), pgd(model), checks=False)
    except (RanksDisagreeError, ValueError) as error:
        assert "same images" in str(error) or "bounds" in str(error), error
    else:
        raise AssertionError("other images")

def killed():
    model = shared()
    passes = [20]
    def end(*_):
        passes[0] -= 1
        if rank and not passes[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    model.blocks[0].register_forward_hook(end)
    try:
        run(model)
    except ExchangeError as error:
        assert "rank 1" in str(error) and "ended" in str(error), error
    else:
        raise AssertionError("survived")
    os.waitpid(child, 0)
    os._exit(0)

for case in (expert_parallel, fully_sharded, ensembles, whole_groups, budgets, journals,
             random_models, attacks_alone, refused, killed):
    case()
'''


def test_verdicts_are_those_of_one_process(tmp_path):
    run_in_two_processes(PROGRAM, tmp_path, before=IMPORTS)
