"""What has no certificate: images that influence each other, random models, and arguments that say
nothing."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from ironmoe.attacks.certificates import Smoothed, attack_curve, certify, predict
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, VMoE

OPTIONS = {"sigma": 0.25, "selection": 10, "samples": 40}


def vmoe(**options):
    """A small V-MoE whose head is not all zeros."""
    torch.manual_seed(0)
    arguments = {"moe_layers": (0,), "num_experts": 4, "channels": 1, "classifier": "gap"}
    model = VMoE(12, 4, 8, 1, 2, 8, 3, **arguments | options).double().eval()
    nn.init.normal_(model.head.weight)
    return model


def expert_choice(**options):
    router = ExpertChoiceRouter(8, 4, 1.0, multiple_of=1, **options)
    return vmoe(make_moe=lambda: MoE(8, 8, 4, router=router))


PICTURES = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0)).double()
SEVERAL = PICTURES, torch.arange(4) % 3


def every_way(model, data):
    """The functions that take a model, on these images."""
    return {
        "certify": lambda: certify(model, data, **OPTIONS),
        "predict": lambda: predict(model, data[0], sigma=0.25, samples=40),
        "curve": lambda: attack_curve(model, data, [0.1], sigma=0.25, samples=40, draws=2, steps=1),
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda: vmoe(capacity=Capacity(1.0)),
        lambda: vmoe(capacity=Capacity(1.0, images_per_group=2)),
        lambda: vmoe(capacity=Capacity(1.0, tokens_per_group=9)),
        lambda: expert_choice(),
    ],
)
def test_images_that_influence_each_other_by_their_routing_are_refused(make):
    model = make()
    for way in (*every_way(model, SEVERAL).values(), lambda: Smoothed(model, 0.25)):
        with pytest.raises(ValueError, match=r"must judge each image by itself .* got VMoE"):
            way()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity", [None, Capacity(1.0, images_per_group=1, multiple_of=1)])
def test_groups_of_one_image_are_taken(top_k, capacity):
    model = vmoe(top_k=top_k, capacity=capacity)
    options = OPTIONS | {"sigma": 2.0}
    report = certify(model, SEVERAL, **options)
    assert len(report.certificates) == 4 and report.notes == []
    assert len({each.count for each in report.certificates}) > 1
    assert report.certificates == certify(model, SEVERAL, batch_size=9, **options).certificates


def test_expert_choice_within_each_image_is_taken():
    assert len(certify(expert_choice(images_per_group=1), SEVERAL, **OPTIONS).certificates) == 4


class Looks(nn.Module):
    """A linear model of 8 pixels that does something to its input first."""

    def __init__(self, change, classes=3):
        super().__init__()
        self.change = change
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(
            torch.randn(8, classes, generator=generator, dtype=torch.float64)
        )

    def forward(self, x):
        return self.change(x) @ self.weight.to(x.dtype)


PIXELS = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FEW = PIXELS, torch.tensor([0, 1, 2])


@pytest.mark.parametrize("name", ["certify", "predict", "curve"])
def test_other_models_that_look_at_the_batch_are_found_out(name):
    for change in (
        lambda x: x - x.mean(0),
        lambda x: x * len(x),
        lambda x: torch.cat([x[1:], x[:1]]),
        lambda x: x.sort(0).values,
    ):
        with pytest.raises(ValueError, match=r"must judge each image by itself .* of 64 noisy cop"):
            every_way(Looks(change), FEW)[name]()


@pytest.mark.parametrize("name", ["certify", "predict", "curve"])
def test_statistics_of_a_batch_are_refused_and_those_of_a_training_are_not(name):
    running = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).double().train()
    every_way(running, FEW)[name]()
    assert running.training and int(running[0].num_batches_tracked) == 0

    of_batch = nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="whose layer '0' normalises by the statistics of the b"):
        every_way(of_batch.double(), FEW)[name]()


@pytest.mark.parametrize("name", ["certify", "predict", "curve"])
def test_models_that_are_random_in_eval_mode_are_refused(name):
    dropout = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    every_way(dropout, FEW)[name]()

    model = Looks(lambda x: nn.functional.dropout(x, 0.5, training=True))
    with pytest.raises(ValueError, match=r"one answer to one image in eval mode .* of 64 noisy"):
        every_way(model, FEW)[name]()


def test_routers_draw_no_noise():
    """Its noise is for training; the model comes back in the mode that it had."""
    model = vmoe().train()
    first = certify(model, SEVERAL, **OPTIONS)
    assert (
        model.training
        and first.certificates == certify(model.eval(), SEVERAL, **OPTIONS).certificates
    )


def test_few_answers_that_change_are_said():
    """A tie of a router, or a layer that seldom draws: one copy in 64."""

    def change(x):
        marked = x.clone()
        marked[(x[:, 0] == x[:, 0].max()) & (len(x) == 64)] += 1.0
        return marked

    report = certify(Looks(change), FEW, **OPTIONS)
    assert len(report.notes) == 1 and "1 of 64 noisy copies" in report.notes[0]
    assert report.notes[0] in str(report) and report.notes[0] in report.as_dict()["notes"]


def test_outputs_that_are_not_finite_are_named_by_the_image():
    images = torch.full((5, 8), 0.2, dtype=torch.float64)
    images[3] = 0.9
    data = images, torch.zeros(5, dtype=torch.int64)
    model = Looks(lambda x: torch.where(x.mean(1, keepdim=True) > 0.6, float("nan"), x))
    for sizes in ({"batch_size": 1}, {"batch_size": 33}, {}):
        with pytest.raises(ValueError, match=r"finite logits.*image with the number 3 in"):
            certify(model, data, sigma=0.01, samples=30, selection=5, **sizes)
    ruled_out = Looks(lambda x: x, classes=4)
    ruled_out.weight.data[:, 3] = 0
    with_one_less = certify(
        lambda x: ruled_out(x) - torch.tensor([0, 0, 0, float("inf")]), data, **OPTIONS
    )
    assert len(with_one_less.certificates) == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0}, r"sigma must lie between 1e-30 and 1e\+30, got 0"),
        ({"sigma": -0.1}, "sigma must lie between"),
        ({"sigma": 1e-40}, "sigma must lie between .* got 1e-40"),
        ({"sigma": 1e39}, r"sigma must lie between .* got 1e\+39"),
        ({"sigma": float("nan")}, "sigma must lie between"),
        ({"sigma": float("inf")}, "sigma must lie between"),
        ({"alpha": 0}, "alpha must lie between 0 and 1, got 0"),
        ({"alpha": 1}, "alpha must lie between 0 and 1, got 1"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_arguments_that_say_nothing(wrong, message):
    model = Looks(lambda x: x)
    with pytest.raises(ValueError, match=message):
        certify(model, FEW, **OPTIONS | wrong)
    with pytest.raises(ValueError, match=message):
        predict(model, PIXELS, **{"sigma": 0.25} | wrong)
    with pytest.raises(ValueError, match=message):
        attack_curve(model, FEW, [0.1], **{"sigma": 0.25} | wrong)


def test_other_arguments_that_say_nothing():
    model = Looks(lambda x: x)
    for wrong, error, message in [
        ({"selection": 0}, ValueError, "selection must be at least 1"),
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"family": "some"}, ValueError, "family must be 'each' or 'all', got 'some'"),
        ({"samples": 10.0}, TypeError, "samples must be a whole number, got 10.0"),
        ({"samples": True}, TypeError, "samples must be a whole number, got True"),
        ({"sigma": "big"}, TypeError, "sigma must be a number, got 'big'"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got 0.5"),
    ]:
        with pytest.raises(error, match=message):
            certify(model, FEW, **OPTIONS | wrong)
    for radii in ([], [-1.0], [float("inf")]):
        with pytest.raises(ValueError, match="radii must hold at least one radius"):
            attack_curve(model, FEW, radii, sigma=0.25)
    for radii in (0.5, None, ["near"]):
        with pytest.raises(TypeError, match="radii must be a list of numbers, got"):
            attack_curve(model, FEW, radii, sigma=0.25)
    for wrong in ({"draws": 0}, {"sigma": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must"):
            Smoothed(model, **{"sigma": 0.25} | wrong)


@pytest.mark.parametrize("sigma", [1e-30, 1e30])
def test_the_ends_of_the_range_of_sigma_are_taken(sigma):
    """In float32, too: noise that vanished or was infinite would be no noise."""
    images, labels = PIXELS.float(), FEW[1]
    data = images - images, labels  # nothing is lost beside a 0
    shares = certify(Looks(lambda x: x / sigma), data, **OPTIONS | {"sigma": sigma})
    usual = certify(Looks(lambda x: x / 0.25), data, **OPTIONS)
    assert [each.count for each in shares.certificates] == [
        each.count for each in usual.certificates
    ]
    assert json.loads(json.dumps(shares.as_dict()))["mean_radius"] < 4 * sigma
    assert str(shares)


def test_numbers_of_numpy_are_numbers(tmp_path):
    """They leave nothing behind that JSON does not know."""
    model = Looks(lambda x: x)
    plain = {"sigma": 0.25, "selection": 10, "samples": 40, "alpha": 0.125, "batch_size": 16}
    kinds = {"sigma": np.float32, "alpha": np.float32}
    options = {name: kinds.get(name, np.int64)(value) for name, value in plain.items()}
    given = {"seed": np.int32(3), "limit": np.int64(2)}
    report = certify(model, FEW, journal=tmp_path, **options, **given)
    assert json.dumps(report.as_dict()["images"])
    again = certify(model, FEW, seed=3, limit=2, journal=tmp_path, **plain)  # the same journal
    assert report.certificates == again.certificates

    del options["selection"], plain["selection"]
    predicted = predict(model, PIXELS, seed=np.int32(3), **options)
    assert torch.equal(predicted, predict(model, PIXELS, seed=3, **plain))
    few = {"draws": np.int64(2), "steps": np.int64(2)}
    curve = attack_curve(model, FEW, np.array([0.1, 0.2]), **few, **given, **options)
    assert json.dumps(curve.as_dict()) and len(curve.images) == 2


def test_data_that_is_none():
    model = Looks(lambda x: x)
    empty = PIXELS[:0], FEW[1][:0]
    for data in (empty, [], [empty]):
        with pytest.raises(ValueError, match="data must hold at least one example, got none"):
            certify(model, data, **OPTIONS)
        with pytest.raises(ValueError, match="data must hold at least one example, got none"):
            attack_curve(model, data, [0.1], sigma=0.25)
    assert predict(model, PIXELS[:0], sigma=0.25).shape == (0,)

    with pytest.raises(TypeError, match="data must be"):
        certify(model, PIXELS, limit=1, **OPTIONS)
    with pytest.raises(TypeError, match="data must be"):
        certify(model, [PIXELS], limit=1, **OPTIONS)
    with pytest.raises(ValueError, match="labels must have one entry for each of 3 images"):
        certify(model, (PIXELS, FEW[1][:2]), limit=1, **OPTIONS)
    with pytest.raises(ValueError, match="labels must be below the model's 3 classes, got 3"):
        certify(model, (PIXELS, FEW[1] + 1), **OPTIONS)
    with pytest.raises(ValueError, match="images must lie in bounds"):
        certify(model, (PIXELS * 255, FEW[1]), **OPTIONS)
    with pytest.raises(ValueError, match="images must lie in bounds"):
        predict(model, PIXELS - 1, sigma=0.25)
    with pytest.raises(TypeError, match="images must be a floating point tensor"):
        predict(model, [[0.5]], sigma=0.25)
    with pytest.raises(ValueError, match=r"indices must have shape \(3,\), got \(2,\)"):
        predict(model, PIXELS, sigma=0.25, indices=torch.arange(2))
    with pytest.raises(TypeError, match=r"indices must be a tensor \(3,\), got list"):
        predict(model, PIXELS, sigma=0.25, indices=[0, 1, 2])
    with pytest.raises(TypeError, match=r"indices must be whole numbers, got .* torch.float32"):
        predict(model, PIXELS, sigma=0.25, indices=torch.rand(3))
