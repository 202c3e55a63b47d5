"""Further inputs of a model: they travel with the row of their example, whatever runs them."""

import conformance
import pytest
import torch
from torch import nn
from two_processes import run_in_two_processes

from ironmoe.attacks import (
    APGD,
    PGD,
    AutoAttack,
    FrozenRouting,
    JournalError,
    Square,
    check_model,
    evaluate,
)
from ironmoe.moe import VMoE
from ironmoe.moe.routers.groups import Grouped

COUNT = 6
CASES = conformance.one_norm_each(conformance.cases())
# HopSkipJump asks a lot; a little is enough to see what it asks about.
SHORT = {"hopskipjump": {"initial_probes": 8, "max_probes": 16, "start_tries": 20}}

every_attack = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Turned(nn.Module):
    """Its logits depend on an angle and a shift of each example: with those of another example it
    says something else."""

    def __init__(self):
        super().__init__()
        self.inner = conformance.network(4)

    def forward(self, x, angle, *, shift):
        logits = self.inner(x)
        turned = logits * angle.unsqueeze(1).to(logits) + logits.flip(1) * (1 - angle).unsqueeze(1)
        return turned + shift.to(logits)


def extra_of(count=COUNT):
    generator = torch.Generator().manual_seed(3)
    angle = torch.rand(count, generator=generator, dtype=torch.float64)
    return {"0": angle, "shift": 0.1 * torch.randn(count, 4, generator=generator).double()}


def ask(model, images, extra):
    with torch.no_grad():
        return model(images, extra["0"], shift=extra["shift"])


@pytest.fixture(scope="module")
def model():
    return Turned()


@pytest.fixture(scope="module")
def images():
    return conformance.images(COUNT)


@pytest.fixture(scope="module")
def extra():
    return extra_of()


@pytest.fixture(scope="module")
def labels(model, images, extra):
    labels = ask(model, images, extra).argmax(1)
    labels[2] = (labels[2] + 1) % 4  # misclassified from the start
    return labels


def made(case, model, **options):
    options = SHORT.get(case.name, {}) | options
    return case.make(model, conformance.radius(case.norm), steps=4, **options)


@every_attack
def test_every_example_is_asked_about_with_its_own_further_inputs(
    case, model, images, labels, extra
):
    """The same as a loop over single images, which have no others to be mixed up with."""
    attack = made(case, model)
    whole = attack.run(images, labels, extra=extra)
    assert torch.equal(ask(model, whole.adversarial, extra).argmax(1), whole.prediction)
    for one in range(0, COUNT, 2):
        part = slice(one, one + 1)
        own = {name: value[part] for name, value in extra.items()}
        alone = attack.run(images[part], labels[part], torch.tensor([one]), extra=own)
        assert torch.equal(alone.success, whole.success[part])
        torch.testing.assert_close(alone.adversarial, whole.adversarial[part], rtol=0, atol=1e-6)


@every_attack
def test_an_evaluation_finds_what_the_attack_finds(case, model, images, labels, extra):
    attack = made(case, model)
    alone = attack.run(images, labels, extra=extra).success
    report = evaluate(
        model, (images, labels, extra), {"a": attack}, batch_size=3, checks=False, eps=None
    )
    assert torch.equal(report.attacks["a"].fell, alone)
    assert int((~report.clean_correct).sum()) == 1


def test_further_inputs_are_a_tensor_a_tuple_or_a_dict(images, labels, extra):
    angle, shift = extra["0"], extra["shift"]

    def one(x, angle):
        return conformance.network(4)(x) * (angle.unsqueeze(1) - 0.5)

    def two(x, angle, shift):
        return one(x, angle) + shift

    def results(model, *forms):
        attack = PGD(model, 0.05, steps=4)
        for form in forms:
            yield attack.run(images, labels, extra=form).adversarial
            yield (
                evaluate(
                    model, (images, labels, form), [attack], batch_size=4, keep_adversarial=True
                )
                .attacks[repr(attack)]
                .adversarial
            )

    for model, forms in (
        (one, (angle, (angle,), [angle], {"angle": angle})),
        (two, ((angle, shift), [angle, shift], {"shift": shift, "angle": angle})),
    ):
        first, *others = results(model, *forms)
        for other in others:
            torch.testing.assert_close(other, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
def test_further_inputs_keep_their_dtype_and_shape(images, labels, dtype):
    extra = (torch.arange(COUNT * 6).view(COUNT, 2, 3) % 2).to(dtype)

    def model(x, given):
        assert given.dtype == dtype and given.shape[1:] == (2, 3) and len(given) == len(x)
        return conformance.network(4)(x) + given.double().flatten(1)[:, :4]

    for attack in (PGD(model, 0.05, steps=3), Square(model, 0.05, steps=10)):
        attack.run(images, labels, extra=extra)
        evaluate(model, (images, labels, extra), [attack], batch_size=4)


def test_loaders_give_them_with_each_batch(model, images, labels, extra):
    attack = PGD(model, 0.05, steps=4)
    whole = evaluate(model, (images, labels, extra), {"a": attack}).attacks["a"].fell
    for size in (2, 6):
        batches = [
            [images[places], labels[places], {name: value[places] for name, value in extra.items()}]
            for places in (slice(first, first + size) for first in range(0, COUNT, size))
        ]
        report = evaluate(model, batches, {"a": attack}, batch_size=4)
        assert torch.equal(report.attacks["a"].fell, whole)


def test_batches_must_have_the_same_further_inputs(model, images, labels, extra):
    def optional(x, angle=None):
        return conformance.network(4)(x)

    whole = (images, labels, {"angle": extra["0"]})
    for second in ((images, labels), (images, labels, None), (images, labels, {})):
        for batches in ([whole, second], [second, whole]):
            with pytest.raises(ValueError, match="extra must have the same names in every batch"):
                evaluate(optional, batches, [PGD(optional, 0.05, steps=1)], batch_size=COUNT)


def test_errors_name_what_is_wrong(model, images, labels, extra):
    attack = PGD(model, 0.05, steps=1)
    cases = [
        ({"0": extra["0"][:5]}, ValueError, r"one entry for each of 6 examples, got \(5,\)"),
        ("text", TypeError, "extra must be a tensor, a tuple of tensors or a dict of tensors"),
        ([1.0, 2.0], TypeError, r"got float for '0'"),
        ({"0": extra["0"]}, TypeError, r"does not take further inputs \['0'\]"),
        (extra | {"more": extra["0"]}, TypeError, "does not take further inputs"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            attack.run(images, labels, extra=wrong)
        with pytest.raises(error, match=message):
            evaluate(model, (images, labels, wrong), [attack])
        with pytest.raises(error, match=message):
            evaluate(model, [(images, labels, wrong)], [attack])

    plain = conformance.network(4)
    with pytest.raises(TypeError, match="does not take further inputs"):
        PGD(plain, 0.05).run(images, labels, extra=extra["0"])


def test_other_further_inputs_are_another_evaluation(model, images, labels, extra, tmp_path):
    attack = PGD(model, 0.05, steps=2)

    def run(extra):
        return evaluate(model, (images, labels, extra), {"a": attack}, journal=tmp_path)

    first = run(extra)
    again = run(extra)
    assert torch.equal(first.attacks["a"].fell, again.attacks["a"].fell)
    for name in extra:
        changed = extra | {name: extra[name].clone()}
        changed[name][4] += 0.01
        with pytest.raises(JournalError, match=r"label 4, or further inputs of the model"):
            run(changed)


def test_routing_modes_and_means_of_answers_see_them(images, labels):
    """A model with experts whose images get a brightness of their own."""
    torch.manual_seed(0)
    vmoe = VMoE(
        image_size=4,
        patch_size=2,
        dim=16,
        depth=2,
        heads=2,
        mlp_dim=16,
        num_classes=4,
        channels=1,
        moe_layers=(1,),
        num_experts=4,
    ).double()
    nn.init.normal_(vmoe.head.weight)

    class Brighter(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vmoe

        def forward(self, x, by):
            return self.inner(x + by.view(-1, 1, 1, 1))

    model = Brighter().eval()
    by = torch.linspace(-1, 1, COUNT, dtype=torch.float64)
    right = model(images, by).argmax(1)
    for options in ({"routing": FrozenRouting()}, {"eot": 2}):
        attack = PGD(model, 0.2, steps=3, **options)
        whole = attack.run(images, right, extra=by, passes=1)
        assert torch.equal(model(whole.adversarial, by).argmax(1), whole.prediction)
        parts = [slice(one, one + 1) for one in range(COUNT)]
        numbers = torch.arange(COUNT)
        alone = [
            attack.run(images[p], right[p], numbers[p], extra=by[p], passes=1).success
            for p in parts
        ]
        assert torch.equal(torch.cat(alone), whole.success)


class Pairs(nn.Module):
    """Says that it couples pairs of images, and adds to each what the other one of its pair
    brings along."""

    def __init__(self):
        super().__init__()
        self.inner = conformance.network(4)
        self.group = Grouped(images_per_group=2)

    def forward(self, x, shift):
        assert len(x) % 2 == 0
        other = shift.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        return self.inner(x) + other


def test_groups_keep_the_further_inputs_of_all_their_images(images, extra):
    model = Pairs()
    shift = extra["shift"] * 5
    right = model(images, shift).argmax(1)
    for attack in (PGD(model, 0.05, steps=4), APGD(model, 0.05, steps=4)):
        result = attack.run(images, right, extra=shift)
        assert torch.equal(model(result.adversarial, shift).argmax(1), result.prediction)
        report = evaluate(model, (images, right, shift), {"a": attack}, batch_size=4, checks=False)
        assert torch.equal(report.attacks["a"].fell, result.success)


def test_the_calls_of_autoattack_and_of_the_checks_take_them(model, images, labels, extra):
    attack = AutoAttack(model, eps=0.2, version="custom", attacks_to_run=["apgd-ce", "square"])
    attack.stages[0].steps = 5
    square = attack.stages[1] = Square(model, 0.2, steps=20)
    square.name = "square"
    adversarial = attack.run_standard_evaluation(images, labels, bs=4, extra=extra)
    fell = attack.run(images, labels, extra=extra).success
    one_by_one = attack(images, labels, extra=extra)
    torch.testing.assert_close(adversarial[fell], one_by_one[fell], rtol=0, atol=1e-6)
    assert fell.any() and torch.equal(adversarial[~fell], images[~fell])
    found = attack.run_standard_evaluation_individual(images, labels, extra=extra)
    assert set(found) == {"apgd-ce", "square"}
    flags = check_model(attack.stages[0], images, labels, extra=extra)
    assert not [flag for flag in flags if flag.tripped and flag.name == "batch dependence"]


def test_two_processes_each_take_their_share_of_them(tmp_path):
    run_in_two_processes(
        """
import torch
from ironmoe.attacks import PGD, evaluate

torch.manual_seed(0)
images, shift = torch.rand(13, 1, 4, 4), torch.randn(13, 3)
weight = torch.randn(16, 3)
model = lambda x, shift: x.flatten(1) @ weight + shift
labels = model(images, shift).argmax(1)
attack = PGD(model, 0.03, steps=5)
report = evaluate(model, (images, labels, shift), {"a": attack}, batch_size=4)
alone = attack.run(images, labels, extra=shift)
assert report.clean_correct.all()
assert torch.equal(report.attacks["a"].fell, alone.success)
""",
        tmp_path,
    )


# Models that write where they should not.


def breaking(inner):
    """A model that normalises its images and its shift in place, as many do."""

    def model(x, shift=None):
        x.sub_(0.5).div_(0.25)
        if shift is not None:
            shift.mul_(2)
        logits = inner(x)
        return logits if shift is None else logits + shift

    return model


def careful(inner):
    return lambda x, shift=None: inner((x - 0.5) / 0.25) + (0 if shift is None else 2 * shift)


@every_attack
def test_a_model_that_normalises_in_place_is_attacked_as_one_that_does_not(case, images, extra):
    inner = conformance.network(4)
    shift = extra["shift"]
    right = careful(inner)(images, shift).argmax(1)
    kept, kept_shift = images.clone(), shift.clone()

    eot = 1 + CASES.index(case) % 2
    plain, broken = (
        made(case, build(inner), eot=eot).run(images, right, extra=shift, passes=1)
        for build in (careful, breaking)
    )
    assert torch.equal(plain.success, broken.success)
    torch.testing.assert_close(plain.adversarial, broken.adversarial, rtol=0, atol=1e-9)

    model = breaking(inner)
    evaluate(model, (images, right, shift), [made(case, model)], batch_size=4)
    assert torch.equal(images, kept) and torch.equal(shift, kept_shift)


class Buffered:
    """Writes every answer that needs no gradient where the one before is, as a replayed CUDA graph
    does."""

    def __init__(self, inner):
        self.inner = inner
        self.buffer = torch.zeros(1000, 4, dtype=torch.float64)

    def __call__(self, x):
        logits = self.inner(x)
        if logits.requires_grad:
            return logits
        view = self.buffer[: len(x)]
        return view.copy_(logits)


@pytest.mark.parametrize("make", [PGD, APGD, Square])
def test_a_model_may_write_its_next_answer_where_the_last_one_is(make, images):
    inner = conformance.network(4)
    right = inner(images).argmax(1)
    options = {"targets": 2} if make is APGD else {}
    plain, buffered = (
        evaluate(model, (images, right), {"a": make(model, 0.05, steps=5, **options)}, batch_size=3)
        for model in (inner, Buffered(inner))
    )
    assert torch.equal(plain.attacks["a"].fell, buffered.attacks["a"].fell)
    assert buffered.clean_correct.all()
    assert not [
        flag for flag in buffered.checks if flag.name == "batch dependence" and flag.tripped
    ]


def test_a_model_may_return_its_input_and_hooks_may_change_it():
    """The logits are the pixels themselves."""

    class Pixels(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    def doubled(module, inputs):
        inputs[0].mul_(2)

    model = Pixels()
    model.register_forward_pre_hook(doubled)
    images = 0.5 + 0.1 * torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).double()
    kept = images.clone()
    labels = images.argmax(1)
    two = images.topk(2, dim=1).values
    for make in (PGD, APGD):
        result = make(model, 0.02, steps=20).run(images, labels)
        assert torch.equal(result.success, two[:, 0] - two[:, 1] < 0.04)
    assert torch.equal(images, kept)
