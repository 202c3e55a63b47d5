"""Every goal under every registered attack: it runs and keeps the promises, or says why not."""

import conformance
import goal_cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.attacks import (
    PGD,
    Custom,
    JournalError,
    Regression,
    Segmentation,
    Square,
    TopK,
    UniversalPerturbation,
    evaluate,
)
from ironmoe.attacks.balls.ball import ball_of

COUNT = 5
KEPT = {"keep_adversarial": True, "checks": False}
ATTACKS = goal_cases.attacks()

every_goal = pytest.mark.parametrize("case", goal_cases.CASES, ids=str)


def data(case, dtype=torch.float64):
    """(model, images, labels)"""
    model, images = case.model(dtype), conformance.images(COUNT).to(dtype)
    with torch.no_grad():
        return model, images, case.labels(model(images))


def made(attack, model, goal, **options):
    """The attack; None if it refuses the goal, and then it names goal and reason."""
    try:
        return attack.make(model, conformance.radius(attack.norm), goal=goal, steps=3, **options)
    except ValueError as error:
        reasons = ("which takes its gradients", "goes through", "whose sign", "which has none")
        assert str(goal) in str(error) and any(reason in str(error) for reason in reasons), error
        return None


def taken(case, model, share=1):
    """The attacks that take the goal, with their cases; every so manyth one, beginning with
    another one for each goal, where a share of them is enough."""
    first = goal_cases.CASES.index(case) % share
    found = [(attack, made(attack, model, case.goal)) for attack in ATTACKS[first::share]]
    return [(attack, one) for attack, one in found if one is not None]


@every_goal
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_success_is_what_the_goal_says_of_the_final_image(case, dtype):
    model, images, labels = data(case, dtype)
    goal = case.goal
    with torch.no_grad():
        reached_before = goal.reached(model(images), labels)
        figure_before = goal.figure(model(images), labels)

    for attack, one in taken(case, model, share=1 if dtype == torch.float64 else 7):
        if dtype == torch.float32 and not attack.kind.inside:
            continue  # at the very boundary rounding decides
        result = one.run(images, labels)
        with torch.no_grad():
            outputs = model(result.adversarial)
        assert torch.equal(result.clean_correct, ~reached_before), attack
        assert torch.equal(result.success, ~reached_before & goal.reached(outputs, labels)), attack
        assert torch.equal(result.prediction, goal.prediction(outputs)), attack
        if not attack.kind.attacks_wrong:
            assert torch.equal(result.adversarial[reached_before], images[reached_before]), attack

        eps = torch.full((COUNT,), conformance.radius(attack.norm), dtype=torch.float64)
        distance = ball_of(attack.norm)(images, eps, (0.0, 1.0)).distance(result.adversarial)
        assert (distance[result.success] <= eps[0]).all(), attack
        if figure_before is None:
            assert result.figure.isnan().all() and result.clean_figure.isnan().all(), attack
        else:
            figure = goal.figure(outputs, labels).double()
            close = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-4}
            torch.testing.assert_close(result.clean_figure, figure_before.double(), **close)
            torch.testing.assert_close(result.figure, figure, **close)


@every_goal
def test_verdicts_do_not_depend_on_batches_and_order(case):
    model, images, labels = data(case)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(4))
    for attack, one in taken(case, model, share=7):
        whole = one.run(images, labels)
        turned = one.run(images[order], labels[order], order)
        assert torch.equal(turned.success[order.argsort()], whole.success), attack
        alone = one.run(images[3:4], labels[3:4], torch.tensor([3]))
        assert torch.equal(alone.steps, whole.steps[3:4]), attack
        assert len(one.run(images[:0], labels[:0]).success) == 0, attack

        report = evaluate(model, (images, labels), {"a": one}, batch_size=3, **KEPT)
        summary = report.attacks["a"]
        assert torch.equal(summary.fell, whole.success), attack
        torch.testing.assert_close(summary.adversarial, whole.adversarial, rtol=0, atol=1e-6)
        torch.testing.assert_close(summary.figure, whole.figure, rtol=0, atol=1e-5, equal_nan=True)


@every_goal
def test_an_evaluation_at_two_radii_goes_on_from_a_cut_journal(case, tmp_path):
    model, images, labels = data(case)
    some = [pair for pair in taken(case, model) if pair[0].name in ("pgd", "square", "cw")]
    if not some:
        some = taken(case, model)
    attack, one = some[goal_cases.CASES.index(case) % len(some)]
    radii = [conformance.radius(attack.norm) / 4, conformance.radius(attack.norm)]
    options = {"eps": radii, "checks": False, "batch_size": 3, "keep_adversarial": True}

    def run():
        return evaluate(model, (images, labels), {"a": one}, journal=tmp_path, **options)

    whole = run().attacks["a"]
    file = tmp_path / "journal-0.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:30])
    resumed = run().attacks["a"]
    for field in ("fell", "decided", "prediction", "figure", "clean_figure", "adversarial"):
        kept, found = getattr(whole, field), getattr(resumed, field)
        torch.testing.assert_close(kept, found, rtol=0, atol=1e-6, equal_nan=True)


@every_goal
def test_checks_say_something_of_every_goal(case):
    model, images, labels = data(case)
    attack = PGD(model, 0.05, steps=2, goal=case.goal, loss=_loss_of(case.goal))
    flags = evaluate(model, (images, labels), {"a": attack}).checks
    assert {"randomised model", "batch dependence"} <= {flag.name for flag in flags}
    assert not [flag for flag in flags if flag.name == "batch dependence" and flag.tripped]


def _loss_of(goal):
    return None if goal.losses else (lambda outputs, labels: outputs.sum(1))


@every_goal
def test_other_forms_of_search_take_every_goal_that_has_a_loss(case):
    """torchattacks' PGD, low precision with means of answers, and one perturbation of all."""
    if not case.goal.losses:
        return
    model, images, labels = data(case)
    goal = case.goal

    def reached(at):
        with torch.no_grad():
            return goal.reached(model(at), labels)

    last = PGD.torchattacks(model, 0.05, steps=2, goal=goal).run(images, labels)
    assert torch.equal(last.success, reached(last.adversarial) & ~reached(images))

    options = {"attack_dtype": torch.bfloat16, "eot": 2, "steps": 2, "goal": goal}
    low = PGD(model, 0.05, **options).run(images, labels, passes=1)
    assert torch.equal(low.success, reached(low.adversarial) & ~reached(images))

    one = UniversalPerturbation(model, 0.05, epochs=1, goal=goal, batch_size=3)
    found = one.fit((images, labels))
    assert found.distance <= 0.05 * (1 + 1e-6) and found.perturbation.any()
    report = found.evaluate((images, labels))
    assert torch.equal(report.clean_correct, ~reached(images))
    added = (images + found.perturbation).clamp(0, 1)
    assert torch.equal(report.fooled, reached(added) & ~reached(images))


def test_a_journal_names_the_goal_and_its_settings(tmp_path):
    case = next(each for each in goal_cases.CASES if isinstance(each.goal, Segmentation))
    model, images, labels = data(case)

    def run(goal):
        evaluate(model, (images, labels), {"a": PGD(model, 0.05, goal=goal)}, journal=tmp_path)

    run(Segmentation(0.8))
    run(Segmentation(0.8))
    for other in (Segmentation(0.7), Segmentation(0.8, ignore_index=2)):
        with pytest.raises(JournalError, match="attacks must be as in the journal"):
            run(other)


def test_attacks_with_other_goals_are_not_evaluated_together():
    case = next(each for each in goal_cases.CASES if isinstance(each.goal, TopK))
    model, images, labels = data(case)
    attacks = {"one": PGD(model, 0.05, goal=TopK(1)), "two": PGD(model, 0.05, goal=TopK(2))}
    with pytest.raises(ValueError, match="attacks must have the same goal"):
        evaluate(model, (images, labels), attacks)
    attacks["two"] = PGD(model, 0.05, goal=TopK(1), steps=3)
    assert evaluate(model, (images, labels), attacks).attacks["two"].decided.all()


def test_attacks_that_take_no_goal_name_it_and_the_reason():
    model = goal_cases.CASES[0].model()
    refused = [attack for attack in ATTACKS if made(attack, model, Regression(1.0)) is None]
    assert {attack.name for attack in refused} == {
        "AutoAttack",
        "apgd-t",
        "deepfool",
        "fab",
        "fab-t",
    }
    with pytest.raises(ValueError, match=r"loss must be a callable for Custom.*which has none"):
        PGD(model, 0.1, goal=Custom(goal_cases.is_above))
    with pytest.raises(ValueError, match="since a goal says itself which way it goes"):
        PGD(model, 0.1, goal=TopK(2), targeted=True)
    with pytest.raises(TypeError, match=r"goal must be None or a goal, .* got TopK"):
        PGD(model, 0.1, goal=TopK)


@every_goal
def test_a_goal_never_waits_for_the_device(case):
    """On fake tensors whatever needs a value, .item() or a nonzero, raises."""
    if not case.goal.losses:
        return
    model, images, labels = data(case)
    goal = case.goal
    outputs = model(images).detach()
    goal.reached(outputs, labels)  # what all examples share is made once
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs, labels = mode.from_tensor(outputs).requires_grad_(), mode.from_tensor(labels)
        assert goal.reached(outputs, labels).shape == (COUNT,)
        assert goal.bad(outputs).shape == goal.prediction(outputs).shape == (COUNT,)
        goal.figure(outputs, labels)
        for loss in goal.losses:
            raised = goal.loss_named(loss)(outputs, labels)
            assert raised.shape == (COUNT,)
            torch.autograd.grad(raised.sum(), outputs)


def test_functions_of_a_user_may_write_on_what_they_are_given():
    images = torch.rand(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = (images @ weight)[:, 0] + 0.1
    plain = Custom(
        lambda outputs, labels: outputs[:, 0] > labels,
        loss=lambda outputs, labels: outputs[:, 0] - labels,
        figure=lambda outputs, labels: outputs[:, 0] - labels,
    )
    writing = Custom(
        lambda outputs, labels: labels.sub_(outputs[:, 0]) < 0,
        loss=lambda outputs, labels: outputs[:, 0].sub_(labels),
        figure=lambda outputs, labels: outputs[:, 0].sub_(labels),
        prediction=lambda outputs: outputs.zero_()[:, 0].long() - 1,
    )

    for attack in (PGD, Square):
        results = [
            attack(lambda x: x @ weight, 0.03, steps=5, goal=goal).run(images, labels.clone())
            for goal in (plain, writing)
        ]
        assert bool(results[0].success.any())
        for name in ("adversarial", "success", "forwards", "figure"):
            assert torch.equal(getattr(results[0], name), getattr(results[1], name))
