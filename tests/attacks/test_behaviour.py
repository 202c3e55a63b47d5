"""What an attack promises around its search: state, inputs, verification, invariance."""

import copy

import pytest
import torch

from ironmoe.attacks import (
    FGSM,
    MIFGSM,
    PGD,
    FixedRadiusAttack,
    Proportion,
    RoutingMode,
    evaluate,
)
from ironmoe.moe import VMoE


class Trained:
    """A small V-MoE fitted to random blobs, so that some images fall and some hold."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = VMoE(
            12, 4, 24, 2, 2, 32, 4, moe_layers=(1,), num_experts=4, channels=1, classifier="gap"
        )
        prototypes = torch.rand(4, 1, 12, 12)
        self.labels = torch.arange(120) % 4
        self.images = (
            0.5 + 0.35 * (prototypes[self.labels] - 0.5) + 0.1 * torch.randn(120, 1, 12, 12)
        ).clamp(0, 1)
        optimizer = torch.optim.AdamW(self.model.parameters(), 3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
            optimizer.step()
        self.model.eval()


@pytest.fixture(scope="module")
def trained():
    return Trained()


@pytest.fixture(scope="module")
def wide(trained):
    """The same in float64: an image beside the boundary of two classes must not fall or hold by the
    rounding of another batch."""
    other = copy.deepcopy(trained)
    other.model.double()
    other.images = other.images.double()
    return other


def snapshot(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        torch.get_rng_state(),
        [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Noisy(torch.nn.Module):
    """Dropout, a frozen batch norm inside a training model, and a switch that makes it fail in the
    middle."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(20, 16),
            torch.nn.BatchNorm1d(16),
            torch.nn.Dropout(),
            torch.nn.Linear(16, 3),
        )
        self.fail_at = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("out of luck")
        return self.body(x) + 0 * torch.rand(1)


@pytest.mark.parametrize("fail_at", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "make", [lambda m: PGD(m, 0.1, steps=4, restarts=2, early_stop=False), lambda m: FGSM(m, 0.1)]
)
def test_the_users_state_comes_back_also_after_an_exception(fail_at, make):
    model = Noisy().train()
    model.body[2].eval()
    model.body[4].weight.requires_grad_(False)
    x = torch.rand(8, 20)
    model(x).sum().backward()
    labels = copy.deepcopy(model).eval()(x).argmax(1)
    model.calls, model.fail_at = 0, fail_at
    before = snapshot(model)
    if fail_at is not None:
        with pytest.raises(RuntimeError, match="out of luck"):
            make(model)(x, labels)
    else:
        make(model)(x, labels)
    assert model.calls >= (fail_at or 3)
    assert same(before, snapshot(model))


def test_images_are_untouched_and_results_detached(trained):
    images = trained.images.clone().requires_grad_()
    adversarial = PGD(trained.model, 0.05, steps=3)(images, trained.labels)
    assert torch.equal(images.detach(), trained.images) and images.grad is None
    assert not adversarial.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_works_in_any_grad_mode(trained, context):
    expected = PGD(trained.model, 0.05, steps=3)(trained.images, trained.labels)
    with context():
        images = trained.images.clone()
        assert torch.equal(PGD(trained.model, 0.05, steps=3)(images, trained.labels), expected)


def test_no_weight_gradient_is_computed(trained):
    """Every product of a weight gradient has a weight's shape; none may appear although the weights
    require grad."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = {
        tuple(p.shape[-2:])
        for n, p in trained.model.named_parameters()
        if "fc" in n and p.ndim >= 2
    }
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("mm", "addmm"):
                seen.append(tuple(out.shape))
            return out

    with Watch():
        PGD(trained.model, 0.05, steps=2)(trained.images[:50], trained.labels[:50])
    assert seen and not shapes & set(seen)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_verified(trained, norm, dtype):
    model = trained.model.to(dtype)
    try:
        images = trained.images.to(dtype)
        eps = {"Linf": 0.06, "L2": 0.25}[norm]
        result = PGD(model, eps, steps=10, norm=norm, restarts=2).run(images, trained.labels)
        delta = (result.adversarial.double() - images.double()).flatten(1)
        distance = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
        torch.testing.assert_close(result.distance, distance, rtol=1e-12, atol=0)
        assert (
            (distance <= eps).all()
            and result.adversarial.min() >= 0
            and result.adversarial.max() <= 1
        )
        prediction = model(result.adversarial).argmax(1)
        assert torch.equal(result.prediction, prediction)
        assert torch.equal(result.success, result.clean_correct & (prediction != trained.labels))
        assert torch.equal(result.clean_correct, model(images).argmax(1) == trained.labels)
        assert 0 < result.success.sum() < len(images)
        wrong = ~result.clean_correct
        assert torch.equal(result.adversarial[wrong], images[wrong])
    finally:
        trained.model.float()


def test_a_success_that_is_not_repeated_does_not_count():
    """A model that errs under autocast only: the search finds, full precision does not confirm."""

    class Fragile(torch.nn.Module):
        def forward(self, x):
            logits = torch.cat([x[:, :1] * 0 + 1, x[:, :1] * 0.5], dim=1)
            return logits.flip(1) if torch.is_autocast_enabled("cpu") else logits

    x, labels = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    result = PGD(Fragile(), 0.1, steps=2, attack_dtype=torch.bfloat16).run(x, labels)
    assert not result.success.any() and result.robust.all()


def test_misclassified_images_are_skipped(trained):
    wrong = (trained.model(trained.images).argmax(1) + 1) % 4
    result = PGD(trained.model, 0.1, steps=5).run(trained.images, wrong)
    assert not result.clean_correct.any() and not result.robust.any() and not result.success.any()
    assert torch.equal(result.adversarial, trained.images)
    assert (result.backwards == 0).all() and (result.forwards == 1).all()


def test_reported_passes_are_the_passes_made(trained):
    rows = []

    def counting(x):
        rows.append((len(x), torch.is_grad_enabled()))
        return trained.model(x)

    result = PGD(counting, 0.05, steps=6, restarts=3).run(trained.images, trained.labels)
    assert int(result.forwards.sum()) == sum(n for n, _ in rows)
    assert int(result.backwards.sum()) == sum(n for n, grad in rows if grad)


def test_early_stop_changes_the_cost_and_not_the_verdict(wide):
    early, full = (
        PGD(wide.model, 0.05, steps=15, early_stop=e).run(wide.images, wide.labels)
        for e in (True, False)
    )
    assert torch.equal(early.success, full.success)
    assert early.backwards.sum() < full.backwards.sum()
    assert early.success.any() and not early.success.all()


def test_eps_per_sample(wide):
    eps = torch.linspace(0, 0.1, 120)
    result = PGD(wide.model, eps, steps=8).run(wide.images, wide.labels)
    assert (result.distance <= eps.double()).all()
    single = PGD(wide.model, eps[77].item(), steps=8).run(
        wide.images[77:78], wide.labels[77:78], torch.tensor([77])
    )
    torch.testing.assert_close(single.adversarial[0], result.adversarial[77], rtol=0, atol=1e-6)


def test_zero_eps_and_zero_steps(trained):
    assert torch.equal(
        PGD(trained.model, 0.0, steps=3)(trained.images, trained.labels), trained.images
    )
    assert torch.equal(
        PGD(trained.model, 0.1, steps=0, random_start=False)(trained.images, trained.labels),
        trained.images,
    )
    start = PGD(trained.model, 0.1, steps=0).run(trained.images, trained.labels)
    assert (start.distance[start.clean_correct] > 0).all()


def test_empty_batch(trained):
    result = PGD(trained.model, 0.1, steps=2).run(
        torch.zeros(0, 1, 12, 12), torch.zeros(0, dtype=torch.int64)
    )
    assert result.adversarial.shape == (0, 1, 12, 12) and result.success.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_images_move_because_the_master_is_float32(dtype):
    weight = torch.randn(50)

    def model(x):
        assert x.dtype == dtype
        score = x.float() @ weight
        return torch.stack([-score, score], 1)

    images = (0.3 + 0.4 * torch.rand(20, 50)).to(dtype)
    labels = model(images).argmax(1)
    result = PGD(
        model,
        1 / 255,
        alpha=1 / 255 / 40,
        steps=40,
        random_start=False,
        early_stop=False,
        loss="margin",
    ).run(images, labels)
    assert result.adversarial.dtype == torch.float32
    moved = (result.adversarial - images.float()).abs()
    # The model sees no change after 30 of the 40 steps, half a bfloat16 unit, so the best iterate
    # may be that one.
    assert (moved > 0.7 / 255).float().mean() > 0.99


@pytest.mark.parametrize("batch_size", [9, 120])
def test_evaluation_does_not_depend_on_batch_size(wide, batch_size):
    data = (wide.images, wide.labels)
    attack = PGD(wide.model, 0.05, steps=8, restarts=2, seed=5)
    whole = evaluate(wide.model, data, {"pgd": attack}, batch_size=50, keep_adversarial=True)
    split = evaluate(
        wide.model, data, {"pgd": attack}, batch_size=batch_size, keep_adversarial=True
    )
    assert torch.equal(whole.attacks["pgd"].robust, split.attacks["pgd"].robust)
    torch.testing.assert_close(
        whole.attacks["pgd"].adversarial, split.attacks["pgd"].adversarial, rtol=0, atol=1e-6
    )


def test_verdicts_do_not_depend_on_order(wide):
    order = torch.randperm(120)
    attack = PGD(wide.model, 0.05, steps=8)
    plain = attack.run(wide.images, wide.labels)
    permuted = attack.run(wide.images[order], wide.labels[order], order)
    assert torch.equal(permuted.success, plain.success[order])


def test_evaluate_reports_each_attack_and_the_worst_case(wide):
    attacks = {"fgsm": FGSM(wide.model, 0.05), "pgd": PGD(wide.model, 0.05, steps=10)}
    loader = list(zip(wide.images.split(50), wide.labels.split(50), strict=True))
    seen = []
    report = evaluate(wide.model, loader, attacks, batch_size=20, on_progress=seen.append)
    assert [p.decided for p in seen] == list(range(1, 241))
    assert seen[0].total is None and seen[0].seconds_left is None  # more may come
    assert seen[-1].total == 240
    # one clean pass serves both
    assert seen[-1].forwards >= sum(s.forwards for s in report.attacks.values()) - 120
    robust = [s.robust for s in report.attacks.values()]
    assert report.worst_case.count == int((robust[0] & robust[1] & report.clean_correct).sum())
    assert (
        report.attacks["pgd"].robust_accuracy.count <= report.attacks["fgsm"].robust_accuracy.count
    )
    listed = evaluate(wide.model, loader, list(attacks.values()))
    assert [
        torch.equal(s.robust, r) for s, r in zip(listed.attacks.values(), robust, strict=True)
    ] == [True, True]
    assert list(listed.attacks)[1] == "PGD(Linf, eps=0.05, steps=10, restarts=1, seed=0)"
    numbers = report.as_dict()
    assert numbers["attacks"]["pgd"]["robust"]["total"] == 120
    assert numbers["attacks"]["fgsm"]["backwards"] == int(report.clean_correct.sum())


def test_evaluate_names_bad_calls(trained):
    data = (trained.images, trained.labels)
    with pytest.raises(ValueError, match="at least one attack"):
        evaluate(trained.model, data, {})
    with pytest.raises(ValueError, match=r"attacks\['pgd'\] must be made for the model"):
        evaluate(trained.model, data, {"pgd": PGD(lambda x: x, 0.1)})
    with pytest.raises(ValueError, match="at least one example"):
        evaluate(trained.model, [], {"pgd": PGD(trained.model, 0.1)})
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(trained.model, data, {"pgd": PGD(trained.model, 0.1)}, batch_size=0)
    bad = trained.images.clone()
    bad[70] = 2
    with pytest.raises(
        ValueError, match=r"in data 50 … 99: images must lie in bounds.*first in example 20"
    ):
        evaluate(
            trained.model, (bad, trained.labels), {"pgd": PGD(trained.model, 0.1)}, batch_size=50
        )


def test_wilson_interval():
    low, high = Proportion(50, 100).interval()
    assert abs(low - 0.4038) < 1e-4 and abs(high - 0.5962) < 1e-4
    assert (
        Proportion(0, 10).interval()[0] == 0
        and abs(Proportion(0, 10).interval()[1] - 0.2775) < 1e-4
    )
    assert Proportion(10, 10).interval()[1] == 1
    assert Proportion(0, 0).interval() == (0, 1)
    with pytest.raises(ValueError, match="confidence"):
        Proportion(1, 2).interval(1.0)


def test_fgsm_and_mifgsm_are_pgds_that_refuse_what_they_fix():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    assert isinstance(FGSM(model), PGD) and isinstance(MIFGSM(model), PGD)
    for kind, fixed in ((FGSM, {"alpha": 0.5}), (FGSM, {"restarts": 2}), (MIFGSM, {"restarts": 2})):
        name = next(iter(fixed))
        with pytest.raises(ValueError, match=rf"{name} must be .*, got {fixed[name]}: .*PGD"):
            kind(model, **fixed)
    with pytest.raises(TypeError, match="remembers"):
        PGD(model, remembers=True)


def test_former_names_of_what_an_attack_of_ones_own_says_are_refused():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))

    class Former(FixedRadiusAttack):
        queries = 1

        def start(self, attempts):
            attempts["point"] = attempts["clean"]

        def advance(self, attempts, logits, loss, grad):
            attempts["finished"] = attempts["finished"] | True

    images = torch.rand(2, 1, 2, 2)
    with pytest.raises(TypeError, match="max_queries must be set by Former"):
        Former(model).run(images, torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="Together must say coupled_by_loss"):
        type("Together", (RoutingMode,), {"couples": True})
