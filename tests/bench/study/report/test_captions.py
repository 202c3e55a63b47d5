"""What captions say of numbers that the figures themselves leave out."""

import numpy as np
import pytest

from ironmoe.bench.study.report.figures.changed_predictions import CHANGED_PREDICTIONS
from ironmoe.bench.study.report.figures.error_over_eps import (
    UNDER_PGD,
    UNDER_THE_PAPERS_ATTACK,
)
from ironmoe.bench.study.report.figures.over_choices import OVER_CHOICES
from ironmoe.bench.study.report.figures.routed_attacks import ROUTED_ATTACKS
from ironmoe.bench.study.report.figures.routing_change import ROUTING_CHANGE
from ironmoe.bench.study.report.runs import StudyRuns


def runs_of(study):
    return StudyRuns(study.rows, study.arms, study.facts)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def test_the_papers_attack_leaves_the_pixel_range_and_what_is_left_inside_is_said(made_up):
    study = made_up(("dense", "E8"))
    caption = UNDER_THE_PAPERS_ATTACK.caption(runs_of(study))
    assert "its images leave the pixel range" in caption
    inside = {
        arm: 100 - 100 * np.mean([r.values["vmoe-clipped@8"] for r in study.rows if r.arm == arm])
        for arm in ("dense", "E8")
    }
    low, high = sorted(inside, key=inside.get)
    expected = f"pixel range {inside[low]:.1f} % ({low}) to {inside[high]:.1f} % ({high})"
    assert expected in caption
    assert "pixel range" not in UNDER_PGD.caption(runs_of(study))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_readings_that_a_capacity_tells_apart_are_told(made_up, factor):
    study = made_up(("E2",))
    for run in study.rows:
        kept = run.values["routing@8:kept"] = 0.1
        run.values.update({"routing@8:realised": factor * kept, "routing@8:intended": kept})
    caption = ROUTING_CHANGE.caption(runs_of(study))
    assert ("nothing is dropped here" in caption) == (factor == 1)
    assert ("“realised” 20.0 % (E2), “intended” 10.0 % (E2)" in caption) == (factor == 2)


def test_clean_images_with_the_routing_of_attacked_ones_are_drawn_and_counted(made_up):
    runs = runs_of(made_up(("E2", "E8")))
    accuracies, differences = ROUTED_ATTACKS.drawn(runs).axes
    names = [label.get_text() for label in accuracies.get_yticklabels()]
    assert names[-1] == "clean; routing of attacked image"
    assert list(accuracies.get_yticks()) == list(differences.get_yticks())
    assert accuracies.get_ylim() == differences.get_ylim()  # a row of both is at one height
    assert "alone changes 7.0 % (E2) to 9.0 % (E8) of the clean" in ROUTED_ATTACKS.caption(runs)


def test_of_a_training_without_these_attacks_nothing_is_said(made_up):
    study = made_up(("E8",), trainings=("standard", "pgd-at"))
    for run in study.rows:
        if run.training == "pgd-at":
            for mode in ("free", "auxiliary", "frozen", "gates", "experts", "replayed", "rerouted"):
                run.values.pop(f"{mode}@25.5")
    caption = ROUTED_ATTACKS.caption(runs_of(study))
    assert "\nstandard: mean differences" in caption and "pgd-at: " not in caption


def test_predictions_are_followed_on_clean_and_on_attacked_images(made_up):
    figure = CHANGED_PREDICTIONS.drawn(runs_of(made_up(("E8",))))
    assert titles(figure) == [
        f"standard, {images}: {what}"
        for images in ("clean images", "images after PGD")
        for what in ("changed predictions", "divergence")
    ]


def test_over_k_only_lines_that_are_drawn_are_spoken_of(made_up):
    def said(*arms):
        return OVER_CHOICES.caption(runs_of(made_up(arms, seeds=2)))

    one = said("E8", "E8-K1", "E8-renorm")
    assert "E8-renorm" not in one and "trains no router" not in one and "E8-K1" in one
    assert "trains no router" in said("E8-renorm", "E8-K1-renorm")


def test_the_divergence_of_equal_logits_has_no_place_on_a_logarithmic_axis(made_up):
    study = made_up(("E8",))
    for run in study.rows:
        run.values["renormalized:clean:kl"] = 1e-15
        run.values["drop best:clean:kl"] = 1e-3
    axes = CHANGED_PREDICTIONS.drawn(runs_of(study)).axes[1]
    assert axes.get_xlim()[0] > 1e-12
