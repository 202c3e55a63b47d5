"""Labels and images of another form: the error says how they become what is wanted."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.smoothness import local_linearity
from ironmoe.attacks.training import TRADES, Mixup, Standard

COUNT, CLASSES = 4, 3
IMAGES = torch.linspace(0, 1, COUNT * 2).view(COUNT, 1, 1, 2)
LABELS = torch.tensor([0, 1, 2, 1])
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(2, CLASSES))

FORMS = {
    "int32": (LABELS.int(), "use labels.long() where"),
    "floats": (LABELS.float(), "use labels.long() where"),
    "a column": (LABELS[:, None], "use labels.squeeze(1) where"),
    "a float column": (LABELS[:, None].float(), "use labels.squeeze(1).long() where"),
    "one-hot": (nn.functional.one_hot(LABELS, CLASSES), "use labels.argmax(1)"),
    "an array": (LABELS.numpy(), "use torch.as_tensor(labels)"),
    "a list": (LABELS.tolist(), "use torch.as_tensor(labels)"),
}


def message_of(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_another_form_are_told_how_to_become_classes(form):
    labels, advice = FORMS[form]
    calls = [
        lambda: PGD(MODEL, 0.1, steps=1).run(IMAGES, labels),
        lambda: TRADES(MODEL, 0.1)(IMAGES, labels),
        lambda: Standard(MODEL)(IMAGES, labels),
        lambda: local_linearity(MODEL, IMAGES, labels, eps=0.1),
    ]
    if isinstance(labels, torch.Tensor):
        calls.append(lambda: evaluate(MODEL, (IMAGES, labels), [PGD(MODEL, 0.1, steps=1)]))
    for call in calls:
        assert advice in message_of(call), call


def test_the_advice_is_right():
    for labels, advice in FORMS.values():
        code = advice.removeprefix("use ").removesuffix(" where")
        made = eval(code, {"torch": torch, "labels": labels})
        assert torch.equal(made, LABELS) and made.dtype == torch.int64


@pytest.mark.parametrize("form", FORMS)
def test_another_goal_is_named_only_where_it_may_be_meant(form):
    """Whole numbers, one an image, are classes."""
    said = message_of(lambda: PGD(MODEL, 0.1, steps=1).run(IMAGES, FORMS[form][0]))
    assert ("goal=" in said) == (form in ("floats", "a float column", "one-hot"))


def test_one_image_without_an_axis_for_the_batch_is_named():
    said = message_of(lambda: PGD(MODEL, 0.1, steps=1).run(IMAGES[0], LABELS[0]))
    assert "images[None], labels[None]" in said and "goal=" not in said


def test_training_names_both_kinds_of_labels():
    said = message_of(lambda: TRADES(MODEL, 0.1)(IMAGES, LABELS.float()))
    assert "int64 classes (4,), or probabilities in the shape of the logits, (4, 3), got" in said
    said = message_of(lambda: Mixup(1.0)(IMAGES, LABELS.int(), CLASSES))
    assert "use labels.long() where" in said


@pytest.mark.parametrize(
    "attack",
    [
        lambda images: PGD(MODEL, 0.1, steps=1).run(images, LABELS),
        lambda images: TRADES(MODEL, 0.1)(images, LABELS),
        lambda images: Standard(MODEL)(images, LABELS),
    ],
)
def test_images_of_255_are_to_be_divided_in_attacks_and_in_training(attack):
    said = message_of(lambda: attack((255 * IMAGES).round()))
    assert "f they are of 0 … 255, divide them by 255, or use bounds=(0, 255)" in said
    assert "use images / 255" in message_of(lambda: attack((255 * IMAGES).to(torch.uint8)))
    assert "255" not in message_of(lambda: attack(1e6 * IMAGES))
