"""Terms that a routing mode adds to the loss: who can do without them, and who refuses them."""

import pytest
import torch
from torch import nn

from ironmoe.attacks import (
    FAB,
    PGD,
    AutoAttack,
    AuxiliaryLoss,
    DeepFool,
    RoutingDivergence,
    attack_statistics,
)
from ironmoe.moe import ExpertChoiceRouter, MoE, SoftMoE, VMoE, collect_aux_loss

wide = {"dtype": torch.float64}


def vmoe(**options):
    torch.manual_seed(0)
    model = VMoE(
        6,
        3,
        12,
        2,
        2,
        16,
        3,
        moe_layers=(0, 1),
        num_experts=4,
        channels=1,
        classifier="gap",
        **options,
    )
    nn.init.normal_(model.head.weight)
    return model.double().eval()


@pytest.fixture
def images():
    return torch.rand(9, 1, 6, 6, **wide)


class Skipping(nn.Module):
    """A dense model, with an MoE layer that ran once, in training, and never again."""

    def __init__(self):
        super().__init__()
        self.body, self.moe = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), MoE(6, 8, 4, 2)
        self.moe(torch.rand(5, 6))

    def forward(self, x):
        return self.body(x)


WITHOUT_LOSS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double(),
    "soft": lambda: vmoe(make_moe=lambda: SoftMoE(12, 16, 4, activation="gelu_tanh")),
    "expert choice": lambda: vmoe(
        make_moe=lambda: MoE(12, 16, 4, router=ExpertChoiceRouter(12, 4), activation="gelu_tanh")
    ),
    "load alone": lambda: vmoe(router={"importance_weight": 0.0, "load_weight": 1.0}),
    "layer that does not run": lambda: Skipping().double(),
}


@pytest.mark.parametrize("kind", WITHOUT_LOSS)
def test_an_auxiliary_loss_that_is_not_there_cannot_be_ascended(images, kind):
    model = WITHOUT_LOSS[kind]()
    labels = model(images).argmax(1)
    with pytest.raises(
        ValueError,
        match=rf"needs a model that makes one in eval mode, got {type(model).__name__} without",
    ):
        PGD(model, 0.1, steps=2, routing=AuxiliaryLoss()).run(images, labels)
    if kind == "load alone":
        with pytest.raises(
            ValueError, match="needs a model that makes one in eval mode, got VMoE without"
        ):
            PGD.vmoe(model, 0.1, 2, auxiliary_loss=True, bounds=(0, 1)).run(images, labels)


@pytest.mark.parametrize("mode", [None, AuxiliaryLoss()], ids=str)
def test_the_auxiliary_loss_of_the_users_last_forward_comes_back(images, mode):
    """A training step may attack its batch between the forward pass and ``collect_aux_loss``."""

    class Stopping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left = vmoe().train(), 10**6

        def forward(self, x):
            self.left -= 1
            logits = self.body(x)
            if self.left < 0:
                raise RuntimeError("stopped")
            return logits

    model = Stopping()
    labels = model(images).argmax(1)
    expected = [module.aux_loss for module in model.modules() if isinstance(module, MoE)]
    assert len(expected) == 2 and all(loss.requires_grad for loss in expected)
    attack = PGD(model, 0.01, steps=2, routing=mode)
    attack.run(images, labels)
    attack_statistics(model, images, images, labels)
    model.left = 2
    with pytest.raises(RuntimeError, match="stopped"):
        attack.run(images, labels)
    found = [module.aux_loss for module in model.modules() if isinstance(module, MoE)]
    assert all(one is other for one, other in zip(found, expected, strict=True))
    collect_aux_loss(model).backward()


@pytest.mark.parametrize("mode", [RoutingDivergence(1e-3), AuxiliaryLoss(0.0)], ids=str)
def test_attacks_on_boundaries_refuse_a_term_in_the_loss(images, mode):
    model = vmoe()
    for make in (lambda: FAB(model, 0.1, routing=mode), lambda: DeepFool(model, routing=mode)):
        with pytest.raises(
            ValueError,
            match=r"must not add to the loss for \w+, .* logit differences, got \w+\(weight=",
        ):
            make()
    for version in ("standard", "plus"):
        with pytest.raises(
            ValueError,
            match=r'where FAB runs, .* use version="custom" and attacks_to_run without "fab"',
        ):
            AutoAttack(model, version=version, routing=mode)
    assert AutoAttack(model, version="rand", routing=mode).stages
    custom = AutoAttack(
        model, eps=0.3, version="custom", attacks_to_run=["apgd-ce", "apgd-dlr"], routing=mode
    )
    labels = model(images).argmax(1)
    if not mode.coupled_by_loss:
        assert custom.run(images, labels).success.any()
    custom.attacks_to_run.append("fab")
    with pytest.raises(ValueError, match="where FAB runs"):
        custom.run(images, labels)
