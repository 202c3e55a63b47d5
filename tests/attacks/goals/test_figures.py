"""Figures of goals: in results, reports, rows and files; goals of random models, of models that
are not finite, and of a user's own class."""

import json

import pytest
import torch

from ironmoe.attacks import (
    APGD,
    CW,
    PGD,
    ClassSet,
    Confident,
    EmbeddingDistance,
    Goal,
    MultiLabel,
    Regression,
    Segmentation,
    Square,
    Superclass,
    TopK,
    evaluate,
    per_image,
    write_rows,
)

WEIGHT = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGES = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model(x):
    return x.flatten(1) @ WEIGHT.to(x.dtype)


LABELS = model(IMAGES).argmax(1)


def strict(text):
    """Parsed as JSON that has no NaN and no Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_figures_are_those_of_a_loop_over_the_examples():
    """Definitions in plain Python."""
    logits = model(IMAGES)
    rows = logits.tolist()
    labels = torch.randint(5, (20,), generator=torch.Generator().manual_seed(2))
    rank = [1 + sum(z > row[y] for z in row) for row, y in zip(rows, labels.tolist(), strict=True)]
    assert TopK(1).figure(logits, labels).tolist() == rank

    sets = (torch.rand(20, 5, generator=torch.Generator().manual_seed(3)) < 0.5).long()
    for row, true, figure, index in zip(
        rows,
        sets.tolist(),
        MultiLabel().figure(logits, sets).tolist(),
        MultiLabel(jaccard=0.5).figure(logits, sets).tolist(),
        strict=True,
    ):
        said = [int(z > 0) for z in row]
        assert figure == pytest.approx(sum(a == b for a, b in zip(said, true, strict=True)) / 5)
        union = sum(a or b for a, b in zip(said, true, strict=True))
        both = sum(a and b for a, b in zip(said, true, strict=True))
        assert index == pytest.approx(both / union if union else 1.0)

    numbers = logits + 0.1 * torch.arange(5)
    for measure, expected in (("max", 0.4), ("mean", 0.2), ("l2", 0.1 * 30**0.5)):
        figure = Regression(1, measure=measure).figure(logits, numbers)
        torch.testing.assert_close(figure, torch.full_like(figure, expected))

    cosine = torch.nn.functional.cosine_similarity(logits, numbers)
    torch.testing.assert_close(EmbeddingDistance(0.1).figure(logits, numbers), 1 - cosine)


def test_pixels_and_labels_that_are_not_known_do_not_count():
    outputs = torch.tensor([[2.0, -1.0, 3.0, -4.0]])
    labels = torch.tensor([[1, -1, 0, -1]])
    assert MultiLabel().figure(outputs, labels).item() == 0.5
    assert MultiLabel(wrong=1).reached(outputs, labels) and not MultiLabel(wrong=2).reached(
        outputs, labels
    )
    torch.testing.assert_close(
        MultiLabel().loss_named("margin")(outputs, labels), torch.tensor([3.0])
    )

    logits = torch.zeros(2, 3, 2, 2)
    logits[:, 1] = 1
    maps = torch.tensor([[[1, 1], [0, 255]], [[255, 255], [255, 255]]])
    goal = Segmentation(0.5, ignore_index=255)
    assert goal.figure(logits, maps).tolist() == [2 / 3, 1.0]
    for loss in goal.losses:
        raised = goal.loss_named(loss)(logits, maps)
        assert loss == "margin" or raised[1] == 0


def test_equal_logits_go_to_the_lower_class():
    logits = torch.tensor([[1.0, 1.0, 1.0, 0.0]]).expand(4, -1)
    labels = torch.arange(4)
    assert TopK(1).figure(logits, labels).tolist() == [1, 2, 3, 4]
    for k in (1, 2, 3):
        assert TopK(k).reached(logits, labels).tolist() == (labels + 1 > k).tolist()
    assert Confident(0.0).reached(logits, labels).tolist() == (logits.argmax(1) != labels).tolist()
    assert Superclass([0, 1, 1, 1]).reached(logits, labels).tolist() == [False, True, True, True]
    sets = torch.tensor([[0, 1, 1, 0]]).expand(4, -1)
    assert ClassSet().reached(logits, sets).all()


def test_reports_have_figures_and_strict_json(tmp_path):
    attacks = {
        "pgd": PGD(model, 0.1, goal=TopK(2)),
        "square": Square(model, 0.1, steps=20, goal=TopK(2)),
    }
    report = evaluate(model, (IMAGES, LABELS), attacks, journal=tmp_path)
    summary = report.attacks["pgd"]
    assert (summary.clean_figure == 1).all() and (summary.figure[summary.fell] > 2).all()
    means = summary.mean_figures
    assert means == {"clean": 1.0, "attacked": pytest.approx(float(summary.figure.mean()))}
    assert strict(json.dumps(report.as_dict()))["attacks"]["pgd"]["figure"] == means

    rows = [row for row in per_image(report) if row["attack"] == "pgd"]
    assert [row["figure"] for row in rows] == summary.figure.tolist()
    assert [row["label"] for row in rows] == LABELS.tolist()
    write_rows(report, tmp_path / "rows.jsonl")
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        strict(line)
    for file in tmp_path.glob("journal-*"):
        for line in file.read_text().splitlines():
            strict(line)


def test_without_a_figure_there_is_none_anywhere(tmp_path):
    for goal in (None, Superclass([0, 0, 1, 1, 1])):
        folder = tmp_path / str(goal)
        report = evaluate(
            model, (IMAGES, LABELS), {"pgd": PGD(model, 0.1, goal=goal)}, journal=folder
        )
        means = {"clean": None, "attacked": None}
        assert report.attacks["pgd"].mean_figures == means
        assert strict(json.dumps(report.as_dict()))["attacks"]["pgd"]["figure"] == means
        assert all(row["figure"] is None for row in per_image(report))
        for line in (folder / "journal-0.jsonl").read_text().splitlines():
            strict(line)


def test_a_random_model_is_judged_over_many_passes_for_every_goal():
    """Noise alone is no success: numbers that are off by the tolerance once in a while hold."""
    torch.manual_seed(0)

    def noisy(x):
        logits = model(x)
        return logits + 0.4 * torch.randn_like(logits)

    values = model(IMAGES)
    attack = PGD(noisy, 1e-6, steps=5, goal=Regression(0.8))
    report = evaluate(noisy, (IMAGES, values), {"pgd": attack})
    assert report.passes == 64
    # the largest of 5 errors is below 2σ with probability 0.9545⁵ = 0.79
    assert 0.7 < report.clean_accuracy.value < 0.88
    assert abs(report.worst_case.value - report.clean_accuracy.value) < 0.05
    result = PGD(noisy, 0.3, steps=20, goal=Regression(0.8)).run(IMAGES, values, passes=64)
    assert result.success.all() and (result.figure > 0.8).all()


def test_examples_that_are_not_finite_are_skipped_by_number():
    def model_with_a_hole(x):
        outputs = model(x)
        return torch.where((x.flatten(1)[:, :1] == IMAGES[7].flatten()[0]), torch.nan, outputs)

    values = model(IMAGES)
    attack = PGD(model_with_a_hole, 0.02, steps=3, random_start=False, goal=Regression(0.3))
    with pytest.raises(ValueError, match="in the data number 7"):
        evaluate(model_with_a_hole, (IMAGES, values), {"a": attack}, checks=False)
    report = evaluate(
        model_with_a_hole, (IMAGES, values), {"a": attack}, checks=False, on_bad="skip"
    )
    assert report.skipped == [7] and report.clean_accuracy.total == 19
    assert report.attacks["a"].mean_figures["clean"] == 0


def test_a_goal_of_a_users_own_class_needs_a_verdict_and_a_loss(tmp_path):
    class Brighter(Goal):
        """The sum of all outputs rises above the label."""

        def __init__(self, by):
            self.by = by

        def reached(self, outputs, labels):
            return outputs.sum(1) > labels + self.by

        def loss(self, outputs, labels):
            return outputs.sum(1) - labels

    sums = model(IMAGES).sum(1)
    reach = 0.1 * WEIGHT.sum(1).abs().sum()
    for by, falls in ((0.9 * reach, True), (1.01 * reach, False)):
        goal = Brighter(float(by))
        options = {"bounds": (-10.0, 10.0), "goal": goal, "steps": 30}
        for make in (PGD, APGD):
            result = make(model, 0.1, **options).run(IMAGES, sums)
            assert result.success.all() == falls and result.success.any() == falls
    with pytest.raises(ValueError, match="goal must have a loss 'margin' for CW"):
        CW(model, goal=Brighter(1.0))

    attack = PGD(model, 0.1, goal=Brighter(1.0))
    evaluate(model, (IMAGES, sums), {"a": attack}, journal=tmp_path)
    with pytest.raises(ValueError, match="attacks must be as in the journal"):
        attack = PGD(model, 0.1, goal=Brighter(2.0))
        evaluate(model, (IMAGES, sums), {"a": attack}, journal=tmp_path)


def test_a_search_may_begin_at_its_own_label():
    """Where the distance is 0 its slope is not."""
    outputs = model(IMAGES).detach()
    cases = [
        *(Regression(0.1, measure=measure) for measure in ("max", "mean", "l2")),
        EmbeddingDistance(0.001),
        EmbeddingDistance(0.1, metric="l2"),
    ]
    for goal in cases:
        attack = PGD(model, 0.1, steps=10, random_start=False, goal=goal)
        result = attack.run(IMAGES, outputs)
        assert result.success.all() and not result.flags["zero_gradient"].any(), goal
        single = PGD(lambda x: model(x)[:, 0], 0.1, random_start=False, goal=Regression(0.05))
        assert single.run(IMAGES, outputs[:, 0]).success.all()
        assert single.run(IMAGES, outputs[:, :1]).success.all()
