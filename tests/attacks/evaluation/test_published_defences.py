"""Published models that claim robustness through randomness, masking or rounding, rebuilt small:
the report says what is wrong with the claim. docs/attacks.md has the figures."""

import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import PGD, Square, evaluate

CLASSES = 4


@pytest.fixture(scope="module")
def data():
    return toys.blobs(64, noise=0.15)


@pytest.fixture(scope="module")
def training_set():
    return toys.blobs(480, noise=0.15, seed=5)


@pytest.fixture(scope="module")
def network(training_set):
    """Without any defence."""
    return toys.mlp(*training_set).float()


class RandomResizing(nn.Module):
    """Images are made smaller and padded at random (Xie et al., arXiv 1711.01991)."""

    def __init__(self, network, least=11):
        super().__init__()
        self.network = network
        self.least = least

    def forward(self, x):
        size = x.shape[-1]
        small = int(torch.randint(self.least, size + 1, ()))
        x = nn.functional.interpolate(x, size=(small, small), mode="bilinear")
        before = torch.randint(0, size - small + 1, (2,)).tolist()
        sides = [side for first in before for side in (first, size - small - first)]
        return self.network(nn.functional.pad(x, sides, value=0.5))


class WinnersTakeAll(nn.Module):
    """Of a layer's numbers only the k largest stay (Xiao et al., arXiv 1905.10510)."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def forward(self, x):
        least = x.topk(int(self.share * x.shape[1]), 1).values[:, -1:]
        return torch.where(x >= least, x, 0)


def winners(training_set, seed):
    torch.manual_seed(seed)
    first = nn.Flatten(), nn.Linear(144, 128), WinnersTakeAll(0.1)
    second = nn.Linear(128, 128), WinnersTakeAll(0.1), nn.Linear(128, CLASSES)
    return toys.fit(nn.Sequential(*first, *second), *training_set, steps=100)


class Smoothed(nn.Module):
    """What an adaptive attack searches on: the mean over noise has the slope that the steps hide
    (Tramèr et al., arXiv 2002.08347)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x + 0.2 * torch.randn_like(x))


class BitDepth(nn.Module):
    """Images are rounded to 3 bits (Guo et al., arXiv 1711.00117; Xu et al., arXiv 1704.01155);
    ``straight`` gives them the gradient of the identity (BPDA, arXiv 1802.00420)."""

    def __init__(self, network, straight=False):
        super().__init__()
        self.network = network
        self.straight = straight

    def forward(self, x):
        rounded = (7 * x).round() / 7
        return self.network(x + (rounded - x).detach() if self.straight else rounded)


class Thermometer(nn.Module):
    """Each pixel becomes 16 digits, which say what it exceeds (Buckman et al., ICLR 2018)."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16 * 144, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x):
        exceeds = x.flatten(1).unsqueeze(-1) > torch.arange(16) / 16
        return self.network(exceeds.float().flatten(1))


class Sure(nn.Module):
    """Logits as large as after defensive distillation at a high temperature (Papernot et al., arXiv
    1511.04508)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return 1000 * self.network(x)


def looked_at(model, data, **attacks):
    """(the report, the names of its flags)."""
    report = evaluate(model, data, attacks)
    return report, {flag.name for flag in report.checks if flag.tripped}


def held(report, name):
    return report.attacks[name].robust_accuracy.value


def test_random_resizing_is_judged_by_many_passes_and_wants_mean_gradients(network, data):
    model = RandomResizing(network)
    single = PGD(model, 0.04, steps=20)
    mean = PGD(model, 0.04, steps=20, eot=10)
    report, flags = looked_at(model, data, single=single, mean=mean)
    assert "randomised model" in flags and report.passes == 64
    assert 0.9 < report.clean_accuracy.value < 1
    assert held(report, "mean") < held(report, "single") - 0.05

    with torch.no_grad():
        right = [(model(data[0]).argmax(1) == data[1]).float().mean() for _ in range(400)]
    low, high = report.clean_accuracy.interval()
    assert low - 0.01 < float(torch.stack(right).mean()) < high + 0.01


def test_random_resizing_does_not_fall_to_luck(network, data):
    """At a radius of nothing what is right stays right, however many attempts there are."""
    model = RandomResizing(network)
    report, _ = looked_at(model, data, pgd=PGD(model, 1e-6, steps=10, restarts=5))
    assert abs(report.worst_case.value - report.clean_accuracy.value) < 0.03


def test_winners_take_all_masks_gradients(training_set, data):
    model = winners(training_set, seed=0)
    attacks = {"pgd": PGD(model, 0.08, steps=20), "square": Square(model, 0.08, steps=200)}
    report, flags = looked_at(model, data, **attacks)
    assert "Square beats the gradient attacks" in flags
    assert report.worst_case.value < held(report, "pgd")

    smoothed = Smoothed(model)
    adaptive = PGD(smoothed, 0.08, steps=20, loss="margin", eot=20)
    found = evaluate(model, data, {"pgd": adaptive}, search_model=smoothed)
    assert found.worst_case.value < held(report, "pgd") - 0.05


def test_bit_depth_has_no_gradient_to_follow(network, data):
    model = BitDepth(network)
    attacks = {"pgd": PGD(model, 0.2, steps=20), "square": Square(model, 0.2, steps=150)}
    report, flags = looked_at(model, data, **attacks)
    assert flags == {
        "quantised input",
        "zero gradients",
        "attacks without a gradient",
        "Square beats the gradient attacks",
    }
    assert held(report, "pgd") == 1 and held(report, "square") < 0.6

    through = BitDepth(network, straight=True)
    report, flags = looked_at(through, data, pgd=PGD(through, 0.2, steps=20))
    assert flags == {"quantised input"} and report.worst_case.count == 0


def test_thermometer_codes_are_for_attacks_without_gradients(training_set, data):
    torch.manual_seed(0)
    model = toys.fit(Thermometer(), *training_set)
    with pytest.raises(ValueError, match="logits without a graph; Square"):
        evaluate(model, data, {"pgd": PGD(model, 0.2)})
    report, flags = looked_at(model, data, square=Square(model, 0.2, steps=150))
    assert flags == set() and report.clean_accuracy.value > 0.95 and held(report, "square") < 0.6
    said = {flag.name: flag.message for flag in report.checks}
    assert "its outputs have no graph" in said["zero gradients"]


def test_large_logits_leave_the_cross_entropy_flat(network, data):
    model = Sure(network)
    attacks = {"ce": PGD(model, 0.08, steps=20), "dlr": PGD(model, 0.08, steps=20, loss="dlr")}
    report, flags = looked_at(model, data, **attacks)
    assert flags == {"zero gradients", "attacks without a gradient"}
    assert held(report, "ce") > 0.9 and held(report, "dlr") < 0.4
