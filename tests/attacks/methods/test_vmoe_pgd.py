"""The paper's attack, and attacks on models whose images influence each other."""

import pytest
import torch

from ironmoe.attacks import FGSM, PGD, AuxiliaryLoss, FrozenRouting
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, VMoE


def test_the_unit_test_of_the_official_code():
    """One step of 0.1 on ‖x − y‖²; where the gradient is 0 nothing moves."""
    x = torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.1, 0.3]])
    y = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.1, 0.3]])

    def distance(logits, labels):
        return (logits - y).square().sum(1)

    adversarial = PGD.vmoe(torch.nn.Identity(), 0.1, 1, loss=distance)(x, torch.tensor([1, 2]))
    torch.testing.assert_close(adversarial, torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.1, 0.3]]))


def test_losses_by_name():
    logits, label = torch.tensor([[0.1, 0.3, 0.6]]).logit(), torch.tensor([1])
    sigmoid = PGD.vmoe(torch.nn.Identity(), loss="sigmoid").loss_of(logits, label)
    torch.testing.assert_close(
        sigmoid,
        -(torch.tensor([0.9]).log() + torch.tensor([0.3]).log() + torch.tensor([0.4]).log()),
    )
    softmax = PGD.vmoe(torch.nn.Identity(), loss="ce").loss_of(
        torch.tensor([[0.1, 0.3, 0.6]]).log(), label
    )
    torch.testing.assert_close(softmax, -torch.tensor([0.3]).log())


def test_every_image_walks_the_whole_way_and_leaves_the_valid_pixels():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    x = torch.ones(5, 3, 2, 2)
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3  # misclassified from the start, and attacked all the same
    result = PGD.vmoe(model, 0.1, 7).run(x, labels)
    torch.testing.assert_close((result.adversarial - x).abs(), torch.full_like(x, 0.1))
    assert result.adversarial.max() > 1 and (result.distance <= 0.1).all() and not result.success[0]
    assert (result.forwards == 9).all() and (result.backwards == 7).all()
    dense = VMoE(8, 4, 16, 1, 2, 16, 3)
    for make, message in (
        (lambda: PGD.vmoe(model, steps=0), "steps must be at least 1"),
        (
            lambda: PGD.vmoe(model, auxiliary_loss=True),
            "auxiliary_loss needs a model with TopKRouters",
        ),
        (
            lambda: PGD.vmoe(dense, auxiliary_loss=True),
            "auxiliary_loss needs a model with TopKRouters",
        ),
        (lambda: PGD.vmoe(model, loss="hinge"), "loss must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_auxiliary_loss_steers_the_attack():
    torch.manual_seed(0)
    model = VMoE(
        8, 4, 16, 2, 2, 16, 3, moe_layers=(0,), num_experts=4, router={"importance_weight": 100.0}
    )
    torch.nn.init.normal_(model.head.weight)
    x, labels = torch.rand(6, 3, 8, 8), torch.randint(3, (6,))
    with_loss, without = (
        PGD.vmoe(model, 0.05, 4, auxiliary_loss=aux)(x, labels) for aux in (True, False)
    )
    assert not torch.equal(with_loss, without)
    assert not any(m.aux_loss_in_eval for m in model.modules() if hasattr(m, "aux_loss_in_eval"))


def test_the_options_of_every_attack():
    torch.manual_seed(0)
    model = VMoE(8, 4, 16, 2, 2, 16, 3, moe_layers=(0, 1), num_experts=4).double().eval()
    torch.nn.init.normal_(model.head.weight)
    x, labels = 2 * torch.rand(6, 3, 8, 8, dtype=torch.float64) - 1, torch.randint(3, (6,))
    plain = PGD.vmoe(model, 0.05, 4)(x, labels)
    for options in (
        {"routing": FrozenRouting()},
        {"routing": AuxiliaryLoss(100.0)},
        {"targeted": True},
    ):
        assert not torch.equal(PGD.vmoe(model, 0.05, 4, **options)(x, labels), plain)

    options = {"normalize": ([0.5] * 3, [2.0] * 3), "logits_fn": lambda output: output["scores"]}
    shown = PGD.vmoe(
        lambda images: {"scores": model(images)}, 0.1, 4, bounds=(-1.5, 2.5), **options
    )
    torch.testing.assert_close(shown(2 * x + 0.5, labels), 2 * plain + 0.5, rtol=0, atol=1e-12)
    for options, message in (
        (
            {"auxiliary_loss": True, "routing": FrozenRouting()},
            "auxiliary_loss must be False with a routing mode, .* got FrozenRouting",
        ),
        ({"norm": "L2"}, "norm must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            PGD.vmoe(model, **options)
    with pytest.raises(TypeError, match=r"arguments of VMoEPGD must be among .*got random_start"):
        PGD.vmoe(model, random_start=True)


def moe(**options):
    torch.manual_seed(0)
    return MoE(6, 8, 4, 1, **options)


@pytest.mark.parametrize(
    ("layer", "coupled"),
    [
        (moe(), False),
        (moe(capacity=Capacity(0.5, images_per_group=3)), True),
        (moe(router=ExpertChoiceRouter(6, 4, images_per_group=3)), True),
    ],
)
def test_no_image_leaves_its_group_if_images_influence_each_other(layer, coupled):
    sizes = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe, self.head = layer, torch.nn.Linear(6, 3)

        def forward(self, x):
            sizes.append(len(x))
            return self.head((x + self.moe(x)).mean(1))

    model = Model()
    x = torch.rand(6, 4, 6)
    labels = model.eval()(x).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    sizes.clear()
    for attack in (PGD(model, eps=0.5, steps=5, restarts=2), FGSM(model, eps=0.5)):
        result = attack.run(x, labels)
        assert result.success.any()
        with torch.no_grad():
            assert torch.equal(model(result.adversarial).argmax(1), result.prediction)
    assert all(size % 3 == 0 for size in sizes) == coupled
