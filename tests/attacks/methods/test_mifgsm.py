"""MI-FGSM: what it finds fools other models, too."""

import pytest
import torch
import toys
from conformance import labels_of

from ironmoe.attacks import MIFGSM


@pytest.mark.parametrize("seeds", [(0, 1), (2, 3), (4, 5)], ids=str)
def test_by_default_it_goes_on_to_where_other_models_are_fooled_too(seeds):
    """The first misclassified point is barely across its own model's boundary; the verdict on that
    model is the same."""
    images, labels = toys.blobs(200, noise=0.2)
    source, target = (toys.mlp(images, labels, seed) for seed in seeds)
    x = images.double()
    right = (labels_of(source, x) == labels) & (labels_of(target, x) == labels)
    x, labels = x[right], labels[right]

    all_the_way = MIFGSM(source, 0.1).run(x, labels)
    barely = MIFGSM(source, 0.1, early_stop=True).run(x, labels)
    assert torch.equal(all_the_way.success, barely.success)
    assert torch.equal(all_the_way.steps, barely.steps)

    transferred, barely_transferred = (
        (labels_of(target, result.adversarial) != labels).double().mean()
        for result in (all_the_way, barely)
    )
    assert transferred > barely_transferred + 0.2


def test_of_all_points_it_keeps_the_one_of_the_highest_loss():
    """Also if the last one is worse: a step of twice eps overshoots this peak."""
    peak = torch.tensor([[0.6, 0.4]], dtype=torch.float64)

    def model(at):
        height = 1 - (at - peak).abs().sum(1, keepdim=True)
        return torch.cat([0.85 - height, height - 0.85], 1)

    images = torch.full((1, 2), 0.5, dtype=torch.float64)
    result = MIFGSM(model, 0.1, alpha=0.1, steps=3).run(images, torch.zeros(1, dtype=torch.int64))
    assert result.success.all()
    torch.testing.assert_close(result.adversarial, peak)
