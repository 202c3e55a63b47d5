"""Numbers in the unit of other people's pixels are warned of, and names of norms go in any case."""

import warnings

import pytest
import torch

from ironmoe.attacks import FGSM, PGD, AutoAttack, evaluate
from ironmoe.attacks.balls.ball import NORMS, ball_of, norm_named

MODEL = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
BYTES = (0, 255)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(MODEL, 8 / 255, alpha=2), "alpha=2 crosses .* write 2 / 255"),
        (lambda: PGD(MODEL, 8, alpha=300, bounds=BYTES), r"write 300 \* 255 / 255"),
        (lambda: PGD(MODEL, 8 / 255, bounds=BYTES), "0.031 of 255 levels .* write 8$"),
        (lambda: FGSM(MODEL, 0.03, bounds=BYTES), "eps=0.03 is 0.03 of 255 levels"),
        (lambda: AutoAttack(MODEL, eps=8 / 255, bounds=BYTES), "0.031 of 255 levels"),
        (lambda: PGD(MODEL, normalize=([123.7] * 3, [58.4] * 3)), "divide both by 255"),
        (
            lambda: PGD(MODEL, 8, bounds=BYTES, normalize=([0.48] * 3, [0.23] * 3)),
            "multiply both by 255",
        ),
        (
            lambda: evaluate(
                MODEL,
                (torch.rand(2, 3, 2, 2) * 255, torch.zeros(2, dtype=torch.int64)),
                {"pgd": PGD(MODEL, 8, steps=1, bounds=BYTES)},
                eps=[8 / 255],
                checks=False,
            ),
            "0.031 of 255 levels",
        ),
    ],
)
def test_another_unit_is_warned_of(make, message):
    with pytest.warns(UserWarning, match=message):
        make()


def test_usual_numbers_are_not():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(MODEL, 8 / 255, alpha=2 / 255, normalize=([0.485] * 3, [0.229] * 3))
        PGD(MODEL, 0.5, alpha=2, norm="L2")  # a step may be longer than an edge of the box
        PGD(MODEL, 8, alpha=2, bounds=BYTES, normalize=([123.7] * 3, [58.4] * 3))
        PGD(MODEL, 8 / 255, bounds=(-1, 1), normalize=([0.0], [1.0]))
        PGD(MODEL, 1e-5)  # a box of shares: nobody means levels
        FGSM(MODEL, 0, bounds=BYTES)


def test_norms_go_in_any_case_with_or_without_their_letter():
    assert [norm_named(text) for text in ("linf", "LINF", "inf", "Inf", "L_inf", "l2", "2")] == [
        *["Linf"] * 5,
        "L2",
        "L2",
    ]
    assert all(norm_named(name) == name and ball_of(name.upper()) is NORMS[name] for name in NORMS)
    assert PGD(MODEL, norm="l2").norm == "L2" and AutoAttack(MODEL, "linf").norm == "Linf"
    assert {stage.norm for stage in AutoAttack(MODEL, "l2").stages} == {"L2"}
    assert norm_named("L7") == "L7"
    with pytest.raises(ValueError, match=r"norm must be one of .* got 'L7'"):
        PGD(MODEL, norm="L7")
