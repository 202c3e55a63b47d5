"""Class stability of linear classifiers, whose distances are known, and what is said of images that
an attack did not solve."""

import math

import pytest
import torch
from smoothness_models import images_of, vmoe
from torch import nn

from ironmoe.attacks import CW, FAB, PGD, DeepFool
from ironmoe.attacks.smoothness import stability
from ironmoe.moe import Capacity

wide = {"dtype": torch.float64}
DUAL = {"Linf": 1, "L2": 2}
BOX = (-10.0, 10.0)


class Linear(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6, generator=generator, **wide))
        self.factor = factor

    def forward(self, x):
        return self.factor * (x @ self.weight.T)


def points(count=8, pixels=6, seed=1):
    return torch.randn(count, pixels, generator=torch.Generator().manual_seed(seed), **wide)


def closed_form(x, labels, norm):
    """The distance to the nearest of the other classes; 0 where another one is best already."""
    weight = Linear().weight.detach()
    logits = x @ weight.T
    distances = []
    for image, label in enumerate(labels.tolist()):
        others = [other for other in range(4) if other != label]
        gaps = [logits[image, label] - logits[image, other] for other in others]
        slopes = [(weight[label] - weight[other]).norm(DUAL[norm]) for other in others]
        distances.append(min(max(g / s, g * 0) for g, s in zip(gaps, slopes, strict=True)))
    return torch.stack(distances)


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("make", [None, DeepFool])
def test_of_a_linear_classifier_it_is_the_distance_to_the_boundary(norm, make):
    model, x = Linear(), points()
    attack = None if make is None else make(model, norm=norm, bounds=BOX)
    found = stability(model, x, norm=norm, bounds=BOX, attack=attack, steps=10)
    expected = closed_form(x, model(x).argmax(1), norm)
    assert found.right.all() and found.solved.all() and found.unsolved == 0
    assert (found.distances >= expected).all()
    torch.testing.assert_close(found.distances, expected, rtol=2e-3, atol=0)
    assert found.low == found.mean == found.high == float(found.distances.mean())


def test_wrong_images_have_no_distance_to_go():
    model, x = Linear(), points()
    labels = model(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    found = stability(model, x, labels, norm="L2", bounds=BOX, steps=10)
    assert found.right.tolist() == [False] * 3 + [True] * 5
    torch.testing.assert_close(found.distances, closed_form(x, labels, "L2"), rtol=2e-3, atol=0)
    assert found.distances[:3].tolist() == [0, 0, 0] and found.unsolved == 0
    assert repr(found).startswith("Stability(8 images, 3 of them wrong, 0 unsolved; mean L2 ")


def test_the_scale_of_the_logits_does_not_matter():
    x = points()
    one, other = (stability(Linear(factor), x, bounds=BOX, steps=5) for factor in (1.0, 64.0))
    torch.testing.assert_close(one.distances, other.distances, rtol=1e-9, atol=0)


def test_bisection_takes_the_overshoot_away():
    model, x = Linear(), points()
    attack = DeepFool(model, norm="L2", bounds=BOX, overshoot=0.3)
    coarse, fine = (
        stability(model, x, norm="L2", attack=attack, refine=refine) for refine in (0, 10)
    )
    expected = closed_form(x, model(x).argmax(1), "L2")
    torch.testing.assert_close(coarse.distances, 1.3 * expected, rtol=0.02, atol=0)
    torch.testing.assert_close(fine.distances, expected, rtol=2e-3, atol=0)


def test_unsolved_images_are_counted_and_bracketed():
    """Two images whose boundary lies beyond the radius of the attack."""
    model, x = Linear(), points()
    expected = closed_form(x, model(x).argmax(1), "L2")
    eps = float(expected.sort().values[5]) * 1.1
    beyond = expected > eps
    assert 0 < int(beyond.sum()) < 3
    attack = FAB(model, eps, steps=10, targets=3, norm="L2", bounds=BOX, early_stop=False)
    found = stability(model, x, norm="L2", attack=attack)
    assert torch.equal(found.distances.isinf(), beyond) and torch.equal(~found.solved, beyond)
    assert found.unsolved == int(beyond.sum()) and found.mean == math.inf
    near = found.distances[~beyond].sum()
    corner = torch.maximum(x + 10, 10 - x).norm(dim=1)
    torch.testing.assert_close(found.farthest, corner)
    assert found.low == pytest.approx(float(near) / 8)
    assert found.high == pytest.approx(float(near + corner[beyond].sum()) / 8)
    ascending = found.distances.sort().values
    assert found.median == float(ascending[3] + ascending[4]) / 2


def test_a_constant_model_leaves_every_image_unsolved():
    def constant(x):
        return torch.cat([1 + 0 * x[:, :1], 0 * x[:, :1]], 1)

    x = points().clamp(-1, 1)
    found = stability(constant, x, bounds=(-1.0, 1.0), steps=3)
    assert found.unsolved == 8 and found.low == 0
    assert found.mean == found.median == math.inf
    assert found.high == float((1 + x.abs()).amax(1).mean())


def test_of_a_v_moe_every_distance_is_that_of_another_class():
    model, x = vmoe().train(), images_of(4)
    labels = torch.tensor([0, 1, 2, 0])
    found = stability(model, x, labels, steps=5, batch_size=3)
    assert found.right.tolist() == (vmoe()(x).argmax(1) == labels).tolist()
    assert ((found.distances > 0) == found.right).all()
    assert all(module.training for module in model.modules())
    coarse = stability(model, x, labels, steps=5, refine=0)
    assert (found.distances <= coarse.distances + 1e-12).all()
    assert (found.distances[found.right] >= 0.5 * coarse.distances[found.right]).all()
    assert len(stability(model, x[:0]).distances) == 0


def test_other_attacks_are_refused():
    model, x = Linear(), points()
    with pytest.raises(TypeError, match=r"attack must look for least distances, .* got PGD"):
        stability(model, x, attack=PGD(model))
    with pytest.raises(ValueError, match="attack must be made for model"):
        stability(model, x, norm="L2", attack=DeepFool(Linear()))
    with pytest.raises(ValueError, match="attack must be in norm='Linf', got one in L2"):
        stability(model, x, attack=DeepFool(model))
    with pytest.raises(ValueError, match="attack must not be targeted"):
        stability(model, x, norm="L2", attack=CW(model, targeted=True))
    with pytest.raises(ValueError, match="refine must be at least 0, got -1"):
        stability(model, x, refine=-1)
    with pytest.raises(ValueError, match="judge each image by itself"):
        stability(vmoe(capacity=Capacity(1.0)), images_of(2))
