"""An attack of a curve keeps to the radius: a fall outside it would put the curve below what is
certified."""

from dataclasses import replace

import pytest
import torch

from ironmoe.attacks import CW, FAB, PGD, DeepFool
from ironmoe.attacks.certificates import attack_curve, certified_and_attacked, certify

OPTIONS = {"sigma": 0.25, "samples": 400, "batch_size": 4096}
DISTANCE = 0.4  # of every image from the boundary

IMAGES = torch.full((6, 4), 0.5)
IMAGES[:, 0] += DISTANCE
DATA = IMAGES, torch.zeros(6, dtype=torch.int64)


def linear(x):
    return torch.stack([x[:, 0] - 0.5, 0.5 - x[:, 0]], 1)


def curve_of(attack, radii=(0.1,), **options):
    return attack_curve(linear, DATA, radii, attack=attack, **OPTIONS | options)


@pytest.mark.parametrize(
    ("attack", "eps"),
    [
        (lambda s, r: PGD(s, 1.0, norm="L2", steps=10), "1.0"),
        (lambda s, r: PGD(s, r * 1.001, norm="L2"), "0.1001"),
        (lambda s, r: PGD(s, torch.tensor([0.0, 0.0, 0.2, 0.1]), norm="L2"), "tensor"),
        (lambda s, r: FAB(s, float("inf"), norm="L2", targets=1), "inf"),
        (lambda s, r: DeepFool(s, float("inf"), norm="L2"), "inf"),
    ],
)
def test_a_larger_eps_is_refused(attack, eps):
    with pytest.raises(ValueError, match=f"must keep to the radius 0.1, got an eps of {eps}"):
        curve_of(attack)


class Moves(PGD):
    """An attack that moves the first element of each image down by as much as it is told, whatever
    its eps; the later the image, the further."""

    def run(self, images, labels, indices=None, *, extra=None, passes=None):
        result = super().run(images, labels, indices, extra=extra, passes=passes)
        moved = images.clone()
        moved[:, 0] -= self.by * (1 + indices.to(images.dtype) / 10)
        return replace(result, adversarial=moved)


def moves(by, **options):
    def attack(smoothed, radius):
        made = Moves(smoothed, radius, norm="L2", steps=1, **options)
        made.by = by
        return made

    return attack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_comes_back_outside_the_radius_is_no_fall(dtype):
    data = IMAGES.to(dtype), DATA[1]
    with pytest.raises(ValueError, match=r"radius 0.1, got a point of Moves.*distance 0.7 from.*0"):
        attack_curve(linear, data, [0.1], attack=moves(0.7), **OPTIONS)
    with pytest.raises(ValueError, match=r"radius 0.5, got a point of Moves.* number 3 in the da"):
        attack_curve(linear, data, [0.5], attack=moves(0.4), **OPTIONS)
    with pytest.raises(ValueError, match=r"radius 0.1, got a point of Moves.*distance nan"):
        attack_curve(linear, data, [0.1], attack=moves(float("nan")), **OPTIONS)
    # A little more than rounding, of which float64 has less.
    with pytest.raises(ValueError, match=r"radius 0.1, got a point of Moves.*distance 0.10000"):
        attack_curve(linear, data, [0.1], attack=moves(0.100001), limit=1, **OPTIONS)

    # As far as the radius and rounding let it: 0.1 + 0.05, which is not 0.15 in float32.
    curve = attack_curve(linear, data, [0.1, 0.9], attack=moves(0.1), limit=1, **OPTIONS)
    assert [image.fell_at for image in curve.images] == [float("inf")]
    curve = attack_curve(linear, data, [0.9], attack=moves(0.6), **OPTIONS)
    assert [image.fell_at for image in curve.images] == [0.9] * 6


def test_rounding_of_large_pixels_is_no_distance():
    """Of 200.3 in float32 the neighbours are 1.5e-5 apart."""
    images = torch.full((1, 1), 200.3)
    moved = float(images.double() - (images - 0.1).double())
    assert moved > 0.1 * (1 + 1e-5)

    def model(x):
        return torch.cat([x - 200.25, 200.25 - x], 1)

    wide = {"bounds": (0.0, 255.0)}
    options = {"sigma": 0.01, "samples": 400} | wide
    data = images, DATA[1][:1]
    curve = attack_curve(model, data, [0.1], attack=moves(0.1, **wide), **options)
    assert [image.fell_at for image in curve.images] == [0.1]
    with pytest.raises(ValueError, match=r"must keep to the radius .* got a point of Moves"):
        attack_curve(model, data, [0.1], attack=moves(0.1001, **wide), **options)


@pytest.mark.parametrize(
    "attack",
    [
        lambda s, r: FAB(s, r, norm="L2", steps=5, targets=1),
        lambda s, r: DeepFool(s, r, norm="L2"),
        lambda s, r: CW(s, r, norm="L2", steps=10, search_steps=2),
        lambda s, r: PGD(s, torch.tensor(r), norm="L2", steps=5),  # a radius in float32
        lambda s, r: PGD(s, r / 2, norm="L2", steps=5),
    ],
)
def test_attacks_of_the_library_keep_to_it(attack):
    """Those that look for the least distance, too; the curve stays above what is certified."""
    curve = curve_of(attack, [0.1, 0.3, 0.35])
    report = certify(linear, DATA, selection=20, **OPTIONS)
    for bracket in certified_and_attacked(report, curve):
        assert bracket.certified.count <= bracket.attacked.count == 6


def test_bounds_are_those_of_the_call():
    def attack(smoothed, radius):
        return PGD(smoothed, radius, norm="L2", steps=1, bounds=(0, 255))

    with pytest.raises(ValueError, match=r"bounds of the call, \(0.0, 1.0\), got \(0, 255\)"):
        curve_of(attack)
    by_element = torch.zeros(4), torch.ones(4)
    with pytest.raises(ValueError, match=r"bounds of the call, \(tensor"):
        curve_of(attack, bounds=by_element)
    assert curve_of(attack, bounds=(0.0, 255.0)).accuracy_at(0.1).count == 6

    def in_tensors(smoothed, radius):
        return PGD(smoothed, radius, norm="L2", steps=1, bounds=by_element)

    assert curve_of(in_tensors).accuracy_at(0.1).count == 6
    by_image = torch.zeros(6, 4), torch.ones(6, 4)
    with pytest.raises(ValueError, match="bounds must be the same for all images of a curve"):
        curve_of(None, bounds=by_image)


def test_what_is_no_attack():
    with pytest.raises(TypeError, match=r"return an attack .* got NoneType at radius 0.1"):
        curve_of(lambda smoothed, radius: None)
    with pytest.raises(TypeError, match=r"return an attack .* got function at radius 0.1"):
        curve_of(lambda smoothed, radius: linear)
    with pytest.raises(TypeError, match=r"attack must be a function .* got PGD"):
        curve_of(PGD(linear, 0.1, norm="L2"))
    with pytest.raises(TypeError, match=r"attack must be a function .* got pgd"):
        curve_of("pgd")


def test_a_model_of_one_class_keeps_its_accuracy():
    """No attack finds another one; it is certified, so it has a curve."""
    curve = attack_curve(lambda x: x[:, :1], DATA, [0.1, 5.0], **OPTIONS)
    assert [share.count for share in curve.accuracies.values()] == [6, 6]
    report = certify(lambda x: x[:, :1], DATA, selection=20, **OPTIONS)
    assert report.smoothed_accuracy.count == 6
