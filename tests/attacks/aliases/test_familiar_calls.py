"""The calls of the official attacks and of torchattacks."""

import re

import conformance
import pytest
import torch
from torch import nn

from ironmoe.attacks import (
    APGD,
    CW,
    FAB,
    FGSM,
    PGD,
    AutoAttack,
    DeepFool,
    FixedRadiusAttack,
    Square,
    TopK,
)
from ironmoe.attacks.aliases.calls import INSTEAD
from ironmoe.attacks.aliases.declared import Only, Turned, declare
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.evaluation.source import Source

MODEL, IMAGES = conformance.network(), conformance.images()
LABELS = conformance.labels_of(MODEL, IMAGES)


class Shift(FixedRadiusAttack):
    """An attack of a user, with a foreign name for an argument, and a name of its own."""

    gradient = False
    aliases = declare(
        magnitude="share",
        percent=Turned("share", lambda percent: percent / 100, 40),
        fast=Only((True,), "there is no slow way"),
    )

    def __init__(self, model, eps=0.1, share=1.0, *, verbose=False, **options):
        self.my_colour = options.pop("colour", "none")
        super().__init__(model, eps, **options)
        self.share = share
        self.verbose = verbose
        self.n_iter = self.max_queries = 1

    def start(self, attempts):
        attempts["point"] = (attempts["clean"] + self.share * self.largest_eps).clamp(0, 1)

    def advance(self, attempts, logits, loss, grad):
        attempts["finished"] = attempts["finished"] | True


class Doubled(Shift):
    """It has no constructor of its own."""

    aliases = declare(strength="share", colour=Only(("red",), "it is always red"))


def test_an_attack_of_a_user_declares_its_aliases_in_a_line():
    assert Shift(MODEL, magnitude=0.3).share == 0.3
    assert Shift(MODEL, percent=30, fast=True).share == 0.3
    with pytest.raises(ValueError, match="fast must be True, got 1: there is no slow way"):
        Shift(MODEL, fast=1)
    with pytest.raises(TypeError, match=r"share must be given once, .* as percent=30"):
        Shift(MODEL, 0.1, 0.5, percent=30)
    with pytest.raises(TypeError, match=r"magnitude \(share\), percent \(share\).* got magnitud$"):
        Shift(MODEL, magnitud=1)

    assert Doubled(MODEL, strength=0.2, colour="red").share == 0.2
    assert Doubled(MODEL, magnitude=0.2).share == 0.2
    with pytest.raises(ValueError, match="colour must be 'red', got 'blue': it is always red"):
        Doubled(MODEL, colour="blue")


def test_an_attack_of_a_user_keeps_its_own_names_and_attributes():
    attack = Shift(MODEL, verbose=True, colour="blue")
    assert attack.verbose is True and attack.my_colour == "blue" and attack.n_iter == 1
    attack.anything = 3
    with pytest.raises(TypeError, match=r"got n_iter$"):  # it has no steps
        Shift(MODEL, n_iter=3)
    result = attack.run(IMAGES, LABELS)
    torch.testing.assert_close(result.adversarial, IMAGES + 0.1, rtol=0, atol=1e-9)


def test_a_class_may_hand_on_whatever_it_gets():
    class Handed(PGD):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)

    attack = Handed(MODEL, 0.1, 0.01, n_iter=3, eot_iter=2, is_tf_model=False)
    assert (attack.eps, attack.alpha, attack.steps, attack.eot) == (0.1, 0.01, 3, 2)
    with pytest.raises(TypeError, match="eps must be float or Tensor, got 'Linf' as argument 2"):
        Handed(MODEL, "Linf")
    with pytest.raises(TypeError, match=r"arguments of Handed must be among .* got itre"):
        Handed(MODEL, itre=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AutoAttack(MODEL, "Linf", 0.1, 0), "version must be str, got 0 as argument 4"),
        (lambda: AutoAttack(MODEL, "Linf", 0.1, None), "version must be str, got None as argum"),
        (
            lambda: AutoAttack(MODEL, "Linf", 0.1, None, True, [], "standard"),
            r"at most 4, got 7: the order here is AutoAttack\(model, norm, eps, version\)",
        ),
        (lambda: AutoAttack(MODEL, 0.1), "norm must be str, got 0.1 as argument 2"),
        (lambda: APGD(MODEL, "Linf", 0.1), "eps must be float or Tensor, got 'Linf' as argument 2"),
        (lambda: APGD(MODEL, 0.1, "Linf", 1), "steps must be int, got 'Linf' as argument 3"),
        (lambda: FAB(MODEL, "L2", 1), "eps must be float or Tensor, got 'L2' as argument 2"),
        (lambda: Square(MODEL, "Linf", 100), "the order here is Square(model, eps, steps, p_init"),
        (lambda: PGD(MODEL, 0.1, 0.1, True), "steps must be int, got True as argument 4"),
        (lambda: PGD(MODEL, 0.1, 0.1, 3, 0), "random_start must be bool, got 0 as argument 5"),
        (lambda: DeepFool(MODEL, 50, 0.02), "steps must be a whole number"),
    ],
)
def test_another_order_is_an_error_that_says_the_order(call, message):
    with pytest.raises(TypeError, match=message.replace("(model, eps", r"\(model, eps")):
        call()


def test_perturb_gives_the_clean_image_where_none_was_found_and_predicts_labels_itself():
    attack = PGD(MODEL, eps=0.05, steps=3)
    result = attack.run(IMAGES, LABELS)
    assert 0 < result.success.sum() < len(IMAGES)
    expected = torch.where(result.success.view(-1, 1, 1, 1), result.adversarial, IMAGES)
    assert torch.equal(attack.perturb(IMAGES, LABELS), expected)
    assert torch.equal(attack.perturb(IMAGES), expected)  # the labels are what the model says
    assert torch.equal(attack(IMAGES, LABELS), result.adversarial)

    wrong = (LABELS + 1) % 3
    assert torch.equal(attack.perturb(IMAGES, wrong), IMAGES)
    with pytest.raises(ValueError, match=r"y must be the labels of the images for .*, got None"):
        PGD(MODEL, targeted=True).perturb(IMAGES)
    with pytest.raises(ValueError, match=r"best_loss must be False, .*early_stop=False"):
        attack.perturb(IMAGES, LABELS, best_loss=True)
    with pytest.raises(ValueError, match="x_init must be None"):
        attack.perturb(IMAGES, LABELS, x_init=IMAGES)
    assert PGD(MODEL, eps=0.05, steps=3, goal=TopK(2)).perturb(IMAGES, LABELS).shape == IMAGES.shape


@pytest.mark.parametrize("name", INSTEAD)
def test_a_method_of_torchattacks_says_what_to_do_instead(name):
    with pytest.raises(AttributeError, match=re.escape(f"FGSM has no {name}: {INSTEAD[name]}")):
        getattr(FGSM(MODEL), name)()
    assert not hasattr(FGSM(MODEL), name)


def test_an_attribute_that_would_change_nothing_cannot_be_set():
    attack = CW(MODEL)
    with pytest.raises(AttributeError, match=r"no attribute 'kappa' to set.*confidence=3"):
        attack.kappa = 3
    with pytest.raises(AttributeError, match="no attribute 'colour' to set"):
        attack.colour = 3
    attack.confidence = 3  # it has this one
    assert attack.confidence == 3
    with pytest.raises(AttributeError, match="'CW' object has no attribute 'colour'"):
        attack.colour  # noqa: B018


class Here(nn.Module):
    """A model that takes its images where its weights are, and says where they came from."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16, 3, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight


def test_the_device_is_that_of_the_weights_or_the_one_that_is_named():
    PGD(Here(), device="cpu")
    PGD(Here(), device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"that of the model's weights, cpu, got 'cuda': move the"):
        PGD(Here(), device="cuda")
    with pytest.raises(ValueError, match=r"weights, meta, got 'cpu'"):
        AutoAttack(Here().to("meta"), device="cpu")
    with pytest.raises((RuntimeError, TypeError), match="must be a torch device, got 'tpu9'"):
        PGD(Here(), device="tpu9")
    with pytest.raises(ValueError, match="device must be one that this machine has, got 'cuda:99'"):
        PGD(lambda at: at.flatten(1), device="cuda:99")


class Stops(PGD):
    """It says where the images of a call come to."""

    def run(self, images, labels, *others, **options):
        raise InterruptedError(f"{images.device} {labels.device}")


def test_images_go_to_the_device_of_a_model_without_weights():
    def model(x):
        return MODEL(x)

    for call in (Stops(model, device="meta"), Stops(model, device="meta").perturb):
        with pytest.raises(InterruptedError, match="meta meta"):
            call(IMAGES, LABELS)
    with pytest.raises(InterruptedError, match="cpu cpu"):
        Stops(model)(IMAGES, LABELS)
    attacks = [PGD(model, device="meta")]
    assert Source((IMAGES, LABELS), attacks, 4, 1, Shard()).device == torch.device("meta")


def test_no_seed_is_one_from_the_clock_that_the_attack_tells():
    one, other = PGD(MODEL, seed=None), PGD(MODEL, seed=None)
    assert one.seed != other.seed and f"seed={one.seed}" in repr(one)
    again = PGD(MODEL, eps=0.05, seed=one.seed).run(IMAGES, LABELS)
    assert torch.equal(PGD(MODEL, eps=0.05, seed=one.seed)(IMAGES, LABELS), again.adversarial)

    attack = AutoAttack(MODEL, seed=None)
    assert {stage.seed for stage in attack.stages} == {attack.seed}
