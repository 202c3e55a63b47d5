"""Models that a measurement would be wrong about: coupled images, and answers at random."""

import pytest
import torch
from smoothness_models import images_of, vmoe
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks.smoothness import (
    jacobian,
    jacobian_matrix,
    local_linearity,
    nearest_swaps,
    slope_profile,
    stability,
)

LABELS = torch.zeros(4, dtype=torch.int64)
MEASUREMENTS = [
    jacobian,
    jacobian_matrix,
    lambda model, x: slope_profile(model, x, [0.1], steps=1),
    lambda model, x: local_linearity(model, x, LABELS, 0.1, steps=1, routings=("free",)),
    lambda model, x: stability(model, x, steps=1),
]


def flat(x):
    return x.flatten(1)[:, :3]


@pytest.mark.parametrize("measure", MEASUREMENTS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: flat(x - x.mean(0)), "judge each image by itself .* smaller batches"),
        (lambda x: flat(nn.functional.dropout(x, 0.5)), "one answer to one image .* is random"),
    ],
)
def test_callables_are_looked_at(measure, model, message):
    with pytest.raises(ValueError, match=message):
        measure(model, images_of(4))


@pytest.mark.parametrize("measure", MEASUREMENTS)
def test_batch_norms_without_running_statistics_are_refused(measure):
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(64, 3)).double()
    with pytest.raises(ValueError, match="'1' normalises by the statistics of the batch"):
        measure(model, images_of(4)[:1])  # even one image: nothing is asked
    with_statistics = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(36, 3)).double()
    measure(with_statistics.train(), images_of(4))


def test_rounding_that_depends_on_the_batch_is_no_coupling():
    model = vmoe(dispatch_dtype=torch.bfloat16).float()
    assert jacobian(model, images_of(16).float()).radius.isfinite().all()

    def noisy(x):  # as much as half precision rounds
        return flat(x) * (1 + 1e-5 * len(x))

    assert jacobian(noisy, images_of(4)).radius.isfinite().all()


def test_reentrant_checkpoints_are_explained():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vmoe()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=True)

    for measure in (*MEASUREMENTS[:-1], nearest_swaps):
        with pytest.raises(ValueError, match="use_reentrant"):
            measure(Checkpointed(), images_of(4))


def test_weights_of_inference_mode_are_explained():
    with torch.inference_mode():
        model = vmoe()
    with pytest.raises(ValueError, match="must not be made under inference mode"):
        jacobian(model, images_of(2))
