"""Radii as people type them, and what is said of them."""

import pytest

from ironmoe.bench.common.choices import did_you_mean, named
from ironmoe.bench.common.radii import (
    ascending_radii,
    one_radius,
    questions,
    step_length,
    told,
)
from ironmoe.bench.common.user_error import UserError


@pytest.mark.parametrize(
    ("text", "norm", "radii"),
    [
        ("8", "Linf", (8,)),
        ("8/255", "Linf", (8,)),
        (" 16/255 , 4/255", "Linf", (4, 16)),
        ("0.031", "Linf", (0.031 * 255,)),
        ("0.01,0.3", "Linf", (2.55, 76.5)),
        ("1/2", "Linf", (127.5,)),
        ("0.5/255", "Linf", (0.5,)),
        ("0.5,1,2", "Linf", (0.5, 1, 2)),
        ("0.0001,8", "Linf", (0.0001, 8)),
        ("0,0.031", "Linf", (0, 0.031 * 255)),
        ("0", "Linf", (0,)),
        ("0.5", "L2", (127.5,)),
        ("128/255,1/1", "L2", (128, 255)),
        ("128", "L2", (128,)),
        ("12/1", "L1", (3060,)),
        ("1e1", "Linf", (10,)),
    ],
)
def test_fractions_shares_and_steps_of_255_are_told_apart(text, norm, radii):
    assert ascending_radii(text, norm) == pytest.approx(radii, rel=1e-12, abs=0)


def test_a_fraction_of_255_is_a_whole_number_of_steps():
    """So a run goes on whichever way its radii are written."""
    assert [ascending_radii(f"{n}/255", "Linf") for n in range(1, 256)] == [
        (n,) for n in range(1, 256)
    ]


@pytest.mark.parametrize("text", ["0.5", "0.1", "0.3,0.9", "0.3,8/255"])
def test_numbers_that_may_be_either_are_asked_back(text):
    with pytest.raises(UserError, match=r"--eps must say its unit .* of 255, or .* of the pixel"):
        ascending_radii(text, "Linf")


@pytest.mark.parametrize("text", ["", "8;2", "8/", "/255", "8/0", "8/2/1", "a/b", "inf/2", "8 255"])
def test_what_is_no_number_is_named(text):
    with pytest.raises(UserError, match="--eps must be numbers separated by commas, such as"):
        ascending_radii(text, "Linf")


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "-8/255", "8,-0.5"])
def test_radii_are_finite_and_not_negative(text):
    with pytest.raises(UserError, match="--eps must be finite and at least 0, got"):
        ascending_radii(text, "Linf")


def test_a_single_radius_and_a_step_are_read_in_the_same_way():
    assert one_radius("8/255", "Linf") == one_radius("8", "Linf") == 8
    with pytest.raises(UserError, match="--train-eps must be a number, such as 8 or 8/255, got"):
        one_radius("8,4", "Linf", "--train-eps")
    assert [step_length(t) for t in ("2", "2/255", "0.5", None)] == [2, 2, 0.5, None]
    assert step_length("0.01") == pytest.approx(2.55)


def test_radii_are_told_in_both_units():
    assert told([4, 8.0, 7.905]) == "4/255 = 0.0157, 8/255 = 0.0314, 7.905/255 = 0.031"


def test_radii_that_nobody_uses_are_asked_back():
    assert questions((0, 2, 8), "Linf") == [] == questions((20,), "L2")
    (tiny,) = questions((0.0001, 8), "Linf")
    assert "understood as 0.0001/255 = 3.92e-07" in tiny and "less than 0.1 of a step" in tiny
    (small,) = questions((2.55,), "L2")  # 0.01 was written
    assert "understood as 2.55/255 = 0.01" in small and "64,128,255,510" in small
    assert "650" not in small


def test_names_are_found_in_any_case_and_others_get_a_hint():
    known = ("pgd", "square", "V-MoE-S/16")
    assert [named(text, known) for text in ("PGD", " Square", "v-moe-s/16", "pdg")] == [
        *known,
        "pdg",
    ]
    assert did_you_mean("sqare", known) == "; did you mean square?"
    several = ("pgd", "apgd-ce", "apgd-t")
    assert did_you_mean("APGD", several) == "; did you mean apgd-ce or apgd-t?"
    assert did_you_mean("something", known) == ""


def test_a_step_longer_than_the_ball_is_wide_is_asked_back():
    assert questions((2, 8), "Linf", 16.0) == [] == questions((0,), "Linf", 300.0)
    (asked,) = questions((2, 8), "Linf", 300.0)
    assert asked.startswith("Is --alpha what you mean? It was understood as 300/255 = 1.18. ")
    assert "longer than the ball of eps = 8/255 = 0.0314 is wide" in asked
