"""AutoAttack: its composition, its call, and what one surviving image costs."""

import pytest
import torch
import toys

from ironmoe.attacks import APGD, FAB, AutoAttack, Square, evaluate
from ironmoe.moe import Capacity


@pytest.fixture(scope="module")
def data():
    images, labels = toys.blobs(40)
    return images.double(), labels


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(data[0].float(), data[1])


def shortened(attack, steps=10, square=60):
    """The same composition with fewer steps."""
    made = attack.stages
    names = [stage.name for stage in made]
    shorter = [
        APGD(
            attack.model,
            attack.eps,
            steps=steps,
            norm=attack.norm,
            loss=s.loss_name,
            targets=s.targets,
            restarts=s.restarts,
        )
        if isinstance(s, APGD)
        else FAB(
            attack.model,
            attack.eps,
            steps=steps,
            norm=attack.norm,
            targets=s.targets,
            restarts=s.restarts,
        )
        if isinstance(s, FAB)
        else Square(attack.model, attack.eps, steps=square, norm=attack.norm)
        for s in made
    ]
    for name, stage in zip(names, shorter, strict=True):
        stage.name = name
    attack._stages = shorter
    return attack


@pytest.mark.parametrize(
    ("version", "norm", "expected"),
    [
        (
            "standard",
            "Linf",
            [
                ("apgd-ce", 1, 0, 100),
                ("apgd-t", 1, 9, 100),
                ("fab-t", 1, 9, 100),
                ("square", 1, 0, 5000),
            ],
        ),
        (
            "standard",
            "L2",
            [
                ("apgd-ce", 1, 0, 100),
                ("apgd-t", 1, 9, 100),
                ("fab-t", 1, 9, 100),
                ("square", 1, 0, 5000),
            ],
        ),
        (
            "standard",
            "L1",
            [
                ("apgd-ce", 5, 0, 100),
                ("apgd-t", 1, 5, 100),
                ("fab-t", 1, 9, 100),
                ("square", 1, 0, 5000),
            ],
        ),
        ("rand", "Linf", [("apgd-ce", 1, 0, 100), ("apgd-dlr", 1, 0, 100)]),
        (
            "plus",
            "Linf",
            [
                ("apgd-ce", 5, 0, 100),
                ("apgd-dlr", 5, 0, 100),
                ("fab", 5, 0, 100),
                ("square", 1, 0, 5000),
                ("apgd-t", 1, 9, 100),
                ("fab-t", 1, 9, 100),
            ],
        ),
    ],
)
def test_the_composition_is_the_official_one(model, version, norm, expected):
    attack = AutoAttack(model, norm, 0.1, version)
    assert [(s.name, s.restarts, s.targets, s.steps) for s in attack.stages] == expected
    assert {s.eot for s in attack.stages} == {20 if version == "rand" else 1}
    assert all(s.attacked_model is attack.attacked_model for s in attack.stages)


def test_each_attack_gets_what_held_and_the_report_says_what_it_took(model, data):
    attack = shortened(AutoAttack(model, eps=0.08))
    report = evaluate(model, data, {"aa": attack}, checks=False)
    summary = report.attacks["aa"]
    assert list(summary.fell_to) == attack.attacks_to_run and 0 < summary.fell.sum() < 40
    assert sum(summary.fell_to.values()) == int(summary.fell.sum())
    alone = evaluate(model, data, {s.name: s for s in attack.stages}, checks=False)
    worst = torch.stack([s.robust for s in alone.attacks.values()]).all(0)
    assert torch.equal(summary.robust, worst)  # one after another finds what all find
    assert summary.forwards < sum(s.forwards for s in alone.attacks.values())
    result = attack.run(*data)
    assert torch.equal(result.success, summary.fell)


def test_the_official_call(model, data):
    attack = shortened(AutoAttack(model, norm="L2", eps=1.5))
    images, labels = data
    adversarial, classes = attack.run_standard_evaluation(images, labels, bs=16, return_labels=True)
    distance = (adversarial - images).flatten(1).norm(dim=1)
    fooled = model(adversarial).argmax(1) != labels
    assert (
        (distance <= 1.5).all()
        and fooled.any()
        and torch.equal(classes, model(adversarial).argmax(1))
    )
    # the clean image where none was found
    assert torch.equal(adversarial[~fooled], images[~fooled])
    single = attack.run_standard_evaluation_individual(images, labels, bs=16)
    assert list(single) == attack.attacks_to_run
    broken = {name: (model(x).argmax(1) != labels) for name, x in single.items()}
    assert torch.equal(torch.stack(list(broken.values())).any(0), fooled)


def test_attacks_to_run_may_be_changed_as_in_the_official_code(model):
    attack = AutoAttack(model, version="custom", attacks_to_run=["apgd-ce"])
    attack.attacks_to_run = ["apgd-dlr", "square"]
    assert [s.name for s in attack.stages] == ["apgd-dlr", "square"]
    attack.attacks_to_run.append("pgd")
    with pytest.raises(ValueError, match=r"attacks_to_run must be among .*got \['pgd'\]"):
        attack.stages  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "fast"}, "version must be one of"),
        ({"version": "custom"}, "attacks_to_run must be given for version 'custom'"),
        (
            {"attacks_to_run": ["square"]},
            "attacks_to_run must be given for version 'custom' and for no other",
        ),
        ({"targeted": True}, "targeted must be False"),
        ({"norm": "L0"}, "norm must be one of"),
    ],
)
def test_what_is_wrong_is_named(model, options, message):
    with pytest.raises(ValueError, match=message):
        AutoAttack(model, **options)


def test_a_model_with_a_capacity_is_refused(data):
    coupled = toys.vmoe(data[0].float(), data[1], capacity=Capacity(0.6, images_per_group=4))
    with pytest.raises(ValueError, match="accepts or rejects"):
        AutoAttack(coupled, eps=0.01).run(*data)


def test_what_a_survivor_costs():
    """The budget identity: passes of an image that nothing breaks, by hooks, are those reported.
    The official code makes 7852 forwards and 1910 backwards of it (102 + 919 + 1828 + 5003 and 101
    + 909 + 900)."""
    weight = torch.randn(10, 3 * 6 * 6, dtype=torch.float64)
    made = {"forwards": 0, "backwards": 0}

    def model(x):
        made["forwards"] += len(x)
        logits = x.flatten(1) @ weight.T
        if logits.requires_grad:
            logits.register_hook(
                lambda grad: made.__setitem__("backwards", made["backwards"] + len(grad))
            )
        return logits

    images = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    labels = model(images).argmax(1)
    made.update(forwards=0)
    report = evaluate(model, (images, labels), {"aa": AutoAttack(model, eps=1e-9)}, checks=False)
    summary = report.attacks["aa"]
    assert summary.robust.all()
    assert (summary.forwards, summary.backwards) == (made["forwards"], made["backwards"])
    assert summary.forwards <= 7852 and summary.backwards <= 1910


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_two_classes_are_enough(data, version):
    """DLR needs three: the margin takes its place."""
    images, labels = data[0][:8], data[1][:8] % 2
    two = toys.mlp(data[0].float(), data[1] % 2)
    attack = AutoAttack(two, eps=1e-4, version=version)
    for stage in attack.stages:
        stage.steps = min(stage.steps, 3)
    held = attack.run(images, labels)
    assert held.robust.any()


def test_classes_that_a_model_rules_out_are_no_targets(model, data):
    """Logits of −∞, as of a model restricted to some classes."""
    images, labels = data[0][:12], data[1][:12]

    def masked(x):
        return torch.cat([model(x), torch.full((len(x), 6), float("-inf"), dtype=x.dtype)], 1)

    attack = APGD(masked, 1e-4, steps=3, loss="dlr", targets=9)
    result = attack.run(images, labels)
    assert (result.backwards[result.robust] == 3 * 3).all()  # three possible targets
