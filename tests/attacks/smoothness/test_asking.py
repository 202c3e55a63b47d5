"""What every measurement does with the model, its images and its further inputs."""

from types import SimpleNamespace

import pytest
import torch
from smoothness_models import images_of, vmoe
from torch import nn

from ironmoe.attacks.smoothness import local_linearity, nearest_swaps, slope_profile, stability

LABELS = torch.tensor([0, 1, 2])


def numbers(model, x, **options):
    """One vector of each measurement."""
    return [
        nearest_swaps(model, x, **options).nearest,
        slope_profile(model, x, [0.05], steps=2, **options).changes,
        slope_profile(model, x, [0.05], steps=2, routing="frozen", **options).changes,
        *local_linearity(
            model, x, LABELS.clone(), 0.05, steps=1, restarts=1, **options
        ).gamma.values(),
        stability(model, x, bounds=(-5.0, 5.0), steps=2, refine=2, **options).distances,
    ]


class Shifted(nn.Module):
    """Returns its logits in an object, takes a shift for each image, and writes on both."""

    def __init__(self):
        super().__init__()
        self.inner = vmoe()

    def forward(self, images, shift):
        shift += 1
        logits = self.inner(images + shift - 1)
        images.data.zero_()
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def plain():
    return numbers(vmoe(), images_of(3), batch_size=2)


def test_further_inputs_travel_with_their_image(plain):
    shift = torch.tensor([0.0, 0.05, -0.05], dtype=torch.float64).view(3, 1, 1, 1)
    found = numbers(Shifted(), images_of(3) - shift, extra=shift, batch_size=2)
    assert shift.flatten().tolist() == [0.0, 0.05, -0.05]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_neither_inference_mode_nor_autocast_changes_a_number(plain):
    model = vmoe()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = numbers(model, images_of(3), batch_size=2)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_changes_no_number_of_a_float32_model():
    """Which it would, were it not turned off: float64 is never cast."""
    model, x = vmoe().float(), images_of(3).float()
    options = {"bounds": (-5.0, 5.0), "steps": 2, "refine": 2, "norm": "L2"}
    plain = stability(model, x, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stability(model, x, **options)
    assert torch.equal(found.distances, plain.distances) and plain.solved.any()


def test_wrong_dtypes_are_explained():
    with pytest.raises(TypeError, match=r"got torch.float32 for weights of torch.float64"):
        nearest_swaps(vmoe(), images_of(3).float())
    with pytest.raises(TypeError, match="model must be callable"):
        nearest_swaps("model", images_of(3))
    with pytest.raises(ValueError, match="extra must have one entry for each of 3 examples"):
        nearest_swaps(vmoe(), images_of(3), extra=torch.ones(2))


def test_of_a_model_in_bfloat16_the_advice_is_one_that_helps():
    model, x = vmoe().bfloat16(), images_of(3).float()
    with pytest.raises(TypeError, match=r"bfloat16: use model\.to\(torch\.float32\)\. The model's"):
        slope_profile(model, x, [0.05], steps=1)
    assert slope_profile(model.float(), x, [0.05], steps=1).changes.isfinite().all()
