"""Errors that say what to do: values just outside the box, one logit, dtypes, channels."""

import numpy as np
import pytest
import torch
import toys
from torch import nn

from ironmoe.attacks import (
    APGD,
    CW,
    FAB,
    MIFGSM,
    PGD,
    DeepFool,
    HopSkipJump,
    Square,
    evaluate,
)
from ironmoe.attacks.model_errors import taking_gradients
from ironmoe.moe.distributed import ExchangeError
from ironmoe.moe.exchange.errors import is_of_exchange


@pytest.fixture(scope="module")
def data():
    return toys.blobs(16)


@pytest.fixture(scope="module")
def model(data):
    return toys.mlp(*data).float()


def message_of(model, images, labels, **options):
    """Of both ways to attack."""
    attack = PGD(model, 0.1, steps=1, **options)
    texts = []
    for run in (
        lambda: attack.run(images, labels),
        lambda: evaluate(model, (images, labels), {"pgd": attack}),
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            run()
        texts.append(str(caught.value))
    assert texts[0] in texts[1]
    return texts[0]


@pytest.mark.parametrize("excess", [1.2e-7, 1e-6, 5e-5])
@pytest.mark.parametrize("side", [0, 1])
def test_rounding_beyond_the_box_is_to_be_clamped(model, data, excess, side):
    images = data[0].clone()
    images[3, 0, 0, 0] = 1 + excess if side else -excess
    message = message_of(model, images, data[1])
    size = float((images - 1).max() if side else -images.min())
    assert f"{size:.2g} outside" in message and "images.clamp(lowest, highest)" in message
    assert "first in example 3" in message


def test_normalised_images_are_to_come_as_they_were(model, data):
    images = (data[0] - 0.45) / 0.225
    message = message_of(model, images, data[1])
    assert "normalize=(mean, std)" in message and "clamp" not in message


def test_images_of_255_are_to_be_divided(model, data):
    message = message_of(model, (255 * data[0]).round(), data[1])
    assert "divide them by 255, or use bounds=(0, 255)" in message


def test_other_values_are_a_matter_of_bounds(model, data):
    assert "bounds= says" in message_of(model, 1e6 * data[0], data[1])


def test_one_logit_is_to_become_two(data):
    labels = data[1] % 2
    network = toys.mlp(data[0], labels).float()

    def column(x):
        return (network(x)[:, 1:] - network(x)[:, :1]) / 2

    assert "torch.cat([-z, z], 1)" in message_of(column, data[0], labels)
    nothing_else = torch.zeros_like(labels)
    for attack in (PGD, APGD, FAB, Square, CW, DeepFool, MIFGSM):
        norm = {"norm": "L2"} if attack in (CW, DeepFool) else {}
        with pytest.raises(ValueError, match="at least 2 classes"):
            attack(column, steps=2, **norm).run(data[0], nothing_else)
        with pytest.raises(ValueError, match="at least 2 classes"):
            evaluate(column, (data[0], nothing_else), {"a": attack(column, steps=2, **norm)})
    assert "torch.stack([-z, z], 1)" in message_of(lambda x: column(x)[:, 0], data[0], labels)

    both = PGD(column, 0.1, logits_fn=lambda z: torch.cat([-z, z], 1)).run(data[0], labels)
    assert torch.equal(both.success, PGD(network, 0.1).run(data[0], labels).success)
    scalar = PGD(lambda x: column(x)[:, 0], 0.1, logits_fn=lambda z: torch.stack([-z, z], 1))
    assert torch.equal(scalar.run(data[0], labels).success, both.success)


@pytest.mark.parametrize("weights", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attack", [PGD, Square])
def test_another_dtype_of_weights_is_named(data, weights, attack):
    model = toys.mlp(*data).to(weights)
    attacks = attack(model, 0.1, steps=1)
    with pytest.raises(TypeError, match=rf"use images.to\({weights}\) or model.to\(torch.float32"):
        attacks.run(*data)
    assert attacks.run(data[0].to(weights), data[1]).clean_correct.any()


def test_an_error_that_is_not_about_dtypes_stays_as_it_is(data):
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match=r"^out of order$"):
        PGD(Broken(2, 2).double(), 0.1).run(*data)


@pytest.mark.parametrize(
    "error",
    [
        ExchangeError("a sum failed: rank 1 ended", "rank 1 ended"),
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"),
    ],
    ids=["named", "of torch"],
)
def test_after_an_error_of_an_exchange_the_model_is_not_asked_again(error):
    asked = []
    points = torch.zeros(1, requires_grad=True)
    with pytest.raises(RuntimeError) as raised, taking_gradients(points, asked.append):
        raise error
    assert raised.value is error and not asked


def test_ranks_in_step_are_not_asked_again_by_one_of_them(monkeypatch):
    """The others may wait for the rest of the pass that failed here."""
    monkeypatch.setattr("ironmoe.attacks.model_errors.group_in_step", object)
    points, asked = torch.ones(2, requires_grad=True), []
    with pytest.raises(RuntimeError, match="unhappy"), taking_gradients(points, asked.append):
        raise RuntimeError("unhappy")
    assert not asked


def test_the_name_of_a_file_is_no_error_of_an_exchange():
    assert not is_of_exchange(RuntimeError("cannot read /data/gloo/images.pt"))
    at = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    assert is_of_exchange(RuntimeError(at))


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_means_as_channels(data, count):
    images = data[0].expand(-1, 3, -1, -1)
    normalize = ([0.5] * count, [0.25] * count)
    message = message_of(lambda x: x.flatten(1), images, data[1], normalize=normalize)
    assert "normalize must be (mean, std)" in message
    assert f"3 channels of images (N, 3, …), got {count}" in message
    for fits in (1, 3):
        attack = PGD(lambda x: x.flatten(1), 0.1, normalize=([0.5] * fits, [0.25] * fits))
        attack.run(images, data[1])


@pytest.mark.parametrize("attack", [PGD, APGD, FAB, Square, DeepFool, CW, MIFGSM])
@pytest.mark.parametrize("steps", [2.5, "3", None])
def test_steps_are_whole_numbers(model, attack, steps):
    with pytest.raises(TypeError, match=r"steps must be a whole number, at least [01], got "):
        attack(model, steps=steps)
    assert attack(model, steps=np.int64(3)).steps == 3


def test_labels_of_another_task_are_told_of_goals(model, data):
    images, labels = data
    maps, numbers = labels[:, None, None].expand(-1, 8, 8), labels.float()
    for others in (maps, numbers, torch.nn.functional.one_hot(labels)):
        assert "give a goal=, such as MultiLabel()" in message_of(model, images, others)
    with pytest.raises(TypeError) as caught:
        PGD(model).run(images, labels[:3])
    assert "goal" not in str(caught.value)


@pytest.mark.parametrize("form", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_outputs_that_are_no_tensor_are_to_be_made_one(model, data, form):
    def service(x):
        return form(model(x.float()).detach().argmax(1))

    with pytest.raises(TypeError, match=r"return a tensor: .* integers \(B,\) are labels"):
        HopSkipJump(service, 0.1).run(*data)


@pytest.mark.parametrize("eps", ["0.1", ["0.1"], [0.1, "0.2"]])
def test_radii_in_words_are_refused(model, data, eps):
    with pytest.raises(TypeError, match="eps must be a list of radii"):
        evaluate(model, data, [PGD(model)], eps=eps)


def test_a_number_of_passes_in_words_is_refused(model, data):
    with pytest.raises(TypeError, match="passes must be None or a whole number, got '64'"):
        evaluate(model, data, [PGD(model)], passes="64")
