"""A warning names the line of the user's program, however deep in the library it arises."""

import warnings

import pytest
import torch
from torch import nn

from ironmoe.attacks import PGD, Square, evaluate
from ironmoe.attacks.training import TRADES


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()


def evaluated(of):
    data = [(IMAGES, LABELS)]
    return evaluate(of, data, {"pgd": PGD(of, steps=1)}, eps=[8], checks=False)


IMAGES = torch.rand(3, 1, 2, 2)
LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize(
    "use",
    [
        lambda: PGD(model(), 8)(IMAGES, LABELS),
        lambda: PGD(model(), 8, steps=1).run(IMAGES, LABELS),
        lambda: PGD(model(), 0.1, alpha=2.0)(IMAGES, LABELS),
        lambda: PGD(model(), 0.1, normalize=((120.0,), (60.0,)))(IMAGES, LABELS),
        lambda: PGD(model(), 8 / 255, bounds=(0, 255))(IMAGES, LABELS),
        lambda: Square(model(), 8, norm="L1")(IMAGES, LABELS),
        lambda: TRADES(model(), 8),
        lambda: evaluated(model()),
    ],
)
def test_the_line_is_that_of_the_user(use):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
    assert caught
    assert {warning.filename for warning in caught} == {__file__}
