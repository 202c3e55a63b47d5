"""What a goal says of settings, labels and outputs that do not go together."""

import pytest
import torch

from ironmoe.attacks import (
    PGD,
    ClassSet,
    Confident,
    Custom,
    EmbeddingDistance,
    HopSkipJump,
    MultiLabel,
    Regression,
    Segmentation,
    Superclass,
    TopK,
    evaluate,
)

X = torch.full((4, 1, 2, 2), 0.5)
CLASSES = torch.zeros(4, dtype=torch.int64)
MAP = torch.zeros(4, 2, 2, dtype=torch.int64)
NUMBERS = torch.zeros(4, 3)
NAN = torch.full((4, 3), float("nan"))


def outputs(*shape):
    return lambda x: (x.flatten(1).sum(1, keepdim=True) * torch.ones(len(x), 24))[
        :, : torch.Size(shape).numel()
    ].view(-1, *shape)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TopK(0), ValueError, "k must be an int, at least 1, got 0"),
        (lambda: TopK(2.5), ValueError, "k must be an int, at least 1, got 2.5"),
        (lambda: Confident(-1), ValueError, "margin must be a number, at least 0, got -1"),
        (lambda: Superclass([0, 0, 0]), ValueError, "of must name at least two superclasses"),
        (lambda: Superclass(["cat"]), TypeError, "of must be one integer for each class"),
        (lambda: MultiLabel(wrong=0), ValueError, "wrong must be an int, at least 1, got 0"),
        (lambda: MultiLabel(jaccard=1.5), ValueError, "jaccard must be above 0 and at most 1"),
        (lambda: MultiLabel(wrong=2, jaccard=0.5), ValueError, "wrong must be left out"),
        (lambda: Segmentation(0), ValueError, "share must be above 0 and at most 1, got 0"),
        (lambda: Segmentation(50), ValueError, "share must be above 0 and at most 1, got 50"),
        (lambda: Segmentation(0.5, ignore_index=0.5), TypeError, "ignore_index must be an int"),
        (lambda: Regression(-0.1), ValueError, "tolerance must be a number, at least 0"),
        (lambda: Regression(1, measure="l3"), ValueError, "measure must be one of"),
        (lambda: EmbeddingDistance(2.0), ValueError, "distance must be a number.*below 2"),
        (lambda: EmbeddingDistance(1, metric="dot"), ValueError, "metric must be one of"),
        (lambda: Custom("reached"), TypeError, "reached must be a function, got 'reached'"),
        (lambda: Custom(print, loss={"a": 1}), TypeError, "a must be a function, got 1"),
        (lambda: Custom(print, figure=1), TypeError, "figure must be a function, got 1"),
        (lambda: PGD(outputs(3), goal=TopK(1), loss="dlr"), ValueError, "loss must be one of"),
    ],
)
def test_settings_outside_of_what_is_allowed_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("goal", "shape", "labels", "error", "message"),
    [
        (TopK(3), (3,), CLASSES, ValueError, "k must be below the model's 3 classes, got 3"),
        (TopK(1), (3,), CLASSES + 3, ValueError, "labels must be below the model's 3 classes"),
        (TopK(1), (3,), NUMBERS, TypeError, r"labels must be an int64 tensor \(4,\)"),
        (TopK(1), (3, 2), CLASSES, TypeError, r"float tensor of logits \(4, C\) for TopK"),
        (Superclass([0, 1]), (3,), CLASSES, ValueError, "of must name the superclasses of the"),
        (ClassSet(), (3,), CLASSES, TypeError, r"labels must be sets of classes \(4, C\)"),
        (ClassSet(), (3,), NUMBERS, ValueError, "at least one class of each example"),
        (ClassSet(), (3,), torch.eye(4)[:, :2] + torch.eye(4)[:, 2:], ValueError, "one entry for"),
        (MultiLabel(), (3,), CLASSES, TypeError, r"labels must be a tensor \(4, L\)"),
        (MultiLabel(), (3,), NUMBERS + 2, ValueError, r"labels must be 0, 1 or −1.*got 2"),
        (MultiLabel(wrong=3), (3,), NUMBERS - 1, ValueError, "at least wrong=3 that are known"),
        (MultiLabel(), (4,), NUMBERS, ValueError, r"shape of the model's outputs \(4, 4\)"),
        (Segmentation(0.5), (3, 2, 2), MAP.float(), TypeError, "labels must be an int64 tensor"),
        (Segmentation(0.5), (1, 2, 2), MAP, ValueError, "MultiLabel takes one logit a pixel"),
        (Segmentation(0.5), (3, 2, 2), MAP[:, None], ValueError, r"shape \(4, 2, 2\) for outputs"),
        (Segmentation(0.5), (3, 2, 2), MAP + 255, ValueError, "from 0 to 2 .*ignore_index=None"),
        (Segmentation(0.5), (3, 2, 2), MAP - 1, ValueError, "from 0 to 2 .*got -1"),
        (Regression(1), (3,), NUMBERS[:, :2], ValueError, r"outputs \(4, 3\), got \(4, 2\)"),
        (Regression(1), (3,), NAN, ValueError, "labels must be finite numbers"),
        (EmbeddingDistance(1), (3,), CLASSES, TypeError, r"float embeddings \(4, D\)"),
        (EmbeddingDistance(1), (3,), NUMBERS, ValueError, "not 0 everywhere"),
        (EmbeddingDistance(1), (4,), NUMBERS + 1, ValueError, r"model's embeddings \(4, 4\)"),
        (Regression(1), (3,), NUMBERS[:3], TypeError, r"labels must be a tensor \(4, …\)"),
    ],
    ids=str,
)
def test_labels_and_outputs_that_do_not_go_together_are_named(goal, shape, labels, error, message):
    model = outputs(*shape)
    attack = PGD(model, 0.1, goal=goal)
    with pytest.raises(error, match=message):
        attack.run(X, labels)
    if len(labels) == len(X):
        with pytest.raises(error, match=message):
            evaluate(model, (X, labels), [attack])


def test_functions_of_a_users_own_goal_are_checked():
    def reached(outputs, labels):
        return outputs[:, 0] > labels

    labels = torch.full((4,), 5.0)
    good = {"reached": reached, "loss": lambda outputs, labels: outputs[:, 0]}
    cases = [
        ({"reached": lambda o, y: o[:, 0]}, r"reached must return a bool tensor \(4,\), got .*flo"),
        ({"reached": lambda o, y: True}, "reached must return a bool tensor.*got bool"),
        ({"loss": lambda o, y: o.sum()}, r"loss must return a tensor \(4,\), got .*shape \(\)"),
        ({"figure": lambda o, y: o}, r"figure must return a tensor \(4,\), got .*\(4, 3\)"),
        ({"prediction": lambda o: o[:, 0]}, "prediction must return an int64 tensor"),
    ]
    for wrong, message in cases:
        attack = PGD(outputs(3), 0.1, goal=Custom(**good | wrong))
        with pytest.raises(TypeError, match=message):
            attack.run(X, labels)

    def check(outputs, labels):
        raise ValueError("labels must be heights, got depths")

    with pytest.raises(ValueError, match="heights, got depths"):
        PGD(outputs(3), 0.1, goal=Custom(**good, check=check)).run(X, labels)
    assert PGD(outputs(3), 0.1, goal=Custom(**good)).run(X, labels).clean_correct.all()


def test_superclasses_are_a_sequence_a_tensor_or_an_array():
    of = torch.tensor([0, 0, 1])
    for form in (of, of.tolist(), tuple(of.tolist()), of.numpy()):
        assert Superclass(form) == Superclass((0, 0, 1))


def test_a_model_of_labels_alone_serves_no_goal_that_needs_numbers():
    def model(x):
        return x.flatten(1).argmax(1)

    for goal in (TopK(1), Confident(0.1), Superclass([0, 0, 1, 1])):
        with pytest.raises(TypeError, match="must return a float tensor of logits"):
            HopSkipJump(model, goal=goal, steps=1).run(X, CLASSES)
    with pytest.raises(TypeError, match=r"must return a float tensor \(4, …\) for Regression"):
        HopSkipJump(model, goal=Regression(1), steps=1).run(X, torch.zeros(4))
