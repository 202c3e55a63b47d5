"""The inner attacks of adversarial training, by closed forms and by what they leave behind."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_toys import EPS, batch, linear, vmoe

from ironmoe.attacks import AuxiliaryLoss, FrozenRouting, GatesOnly, RoutingDivergence
from ironmoe.attacks.training import PGDAT, TRADES, fgsm_rs, kl_pgd, n_fgsm, pgd, vmoe_pgd
from ironmoe.attacks.training.inner.attacks import kl_divergence
from ironmoe.moe import collect_aux_loss


def test_pgd_on_two_classes_moves_every_pixel_by_eps_against_the_margin():
    model, (images, labels) = linear(2), batch(classes=2)
    weight = model[1].weight
    wrong_minus_right = weight[1 - labels] - weight[labels]
    found = pgd(model, images, labels, eps=EPS, steps=7, alpha=EPS)
    expected = images + EPS * wrong_minus_right.sign().view_as(images)
    assert torch.allclose(found, expected.clamp(0, 1), atol=1e-12)


def test_l2_steps_follow_the_direction_of_the_margin_to_the_radius():
    model, (images, labels) = linear(2), batch(classes=2)
    weight = model[1].weight
    direction = nn.functional.normalize((weight[1 - labels] - weight[labels]).view(6, -1))
    found = pgd(
        model, images, labels, eps=EPS, steps=3, alpha=EPS, norm="L2", bounds=None, start="clean"
    )
    assert torch.allclose(found, images + EPS * direction.view_as(images), atol=1e-12)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_wrong_images_move_too_and_all_stay_in_ball_and_box(norm):
    model, (images, _) = linear(), batch()
    images[0] = 0.02
    wrong = (model(images).argmax(1) + 1) % 3
    found = pgd(model, images, wrong, eps=EPS, norm=norm)
    order = float("inf") if norm == "Linf" else 2
    length = (found - images).flatten(1).norm(order, dim=1)
    assert (length > EPS / 2).all() and (length <= EPS * (1 + 1e-12)).all()
    assert found.min() >= 0 and found.max() <= 1


def test_the_gradient_of_trades_is_zero_at_the_image_itself():
    model, (images, _) = linear(), batch()
    points = images.clone().requires_grad_()
    divergence = kl_divergence(model(images).detach(), model(points)).sum()
    (gradient,) = torch.autograd.grad(divergence, [points])
    assert gradient.abs().max() < 1e-14
    moved = kl_pgd(model, images, eps=EPS)
    assert ((moved - images).abs().amax((1, 2, 3)) > EPS / 2).all()


def test_kl_divergence_is_that_of_torch_and_knows_ruled_out_classes():
    p, q = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = nn.functional.kl_div(q.log_softmax(1), p.softmax(1), reduction="none").sum(1)
    assert torch.allclose(kl_divergence(p, q), expected)
    p[:, 2] = q[:, 2] = -torch.inf
    assert kl_divergence(p, q).isfinite().all()


def test_fgsm_rs_stays_inside_eps_and_n_fgsm_goes_beyond():
    model, (images, labels) = linear(), batch(count=60)
    inside = (fgsm_rs(model, images, labels, eps=EPS) - images).abs()
    assert inside.max() <= EPS
    beyond = (n_fgsm(model, images, labels, eps=EPS, bounds=None) - images).abs()
    assert EPS * 2.5 < beyond.max() <= EPS * (3 + 1e-9)
    in_box = n_fgsm(model, images, labels, eps=0.5)
    assert in_box.min() >= 0 and in_box.max() <= 1


def test_steps_of_the_paper_add_up_to_eps_and_clip_nothing():
    model, (images, labels) = linear(2), batch(classes=2)
    images[:] = 1.0
    found = vmoe_pgd(model, images, labels, eps=EPS, steps=4)
    assert torch.allclose((found - images).abs(), torch.full_like(images, EPS), atol=1e-12)
    assert found.max() > 1


def test_the_same_seed_gives_the_same_images():
    model, (images, labels) = linear(), batch()
    torch.manual_seed(5)
    once, other = (pgd(model, images, labels, eps=EPS, steps=1, alpha=0.01) for _ in range(2))
    torch.manual_seed(5)
    again = pgd(model, images, labels, eps=EPS, steps=1, alpha=0.01)
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_a_small_step_in_bfloat16_moves_the_float32_master():
    model, (images, labels) = linear(dtype=torch.bfloat16), batch(dtype=torch.bfloat16)
    found = pgd(model, images, labels, eps=1 / 255, steps=4)
    assert found.dtype == torch.float32
    assert ((found - images.float()).abs() > 0.5 / 255).float().mean() > 0.9


def test_the_model_comes_back_as_it_was():
    model = vmoe(router={"selection_bias": True}).train()
    model.blocks[0].eval()
    frozen = model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    own = model(images)  # its auxiliary losses belong to the user
    flags = [module.training for module in model.modules()]
    counts = [block.mlp.router.choices.clone() for block in model.blocks]

    for mode in ("eval", "train"):
        pgd(model, images, labels, eps=EPS, steps=2, mode=mode)
    assert flags == [module.training for module in model.modules()]
    assert all(weight.grad is None for weight in model.parameters()) and not frozen.requires_grad
    after = [block.mlp.router.choices for block in model.blocks]
    assert all(torch.equal(a, b) for a, b in zip(counts, after, strict=True))
    assert collect_aux_loss(model).requires_grad and own.requires_grad


class Products(TorchDispatchMode):
    """Counts matrix products by the shape of their result."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(result.shape))
        return result


def test_inner_steps_make_no_product_for_a_weight():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3))
    images, labels = batch(count=5, dtype=torch.float32)
    with Products() as inner:
        pgd(model, images, labels, eps=EPS, steps=4)
    forward_and_dx = [(5, 7), (5, 3), (5, 7), (5, 16)]
    assert inner.shapes == 4 * forward_and_dx


@pytest.mark.parametrize(("make", "passes"), [(PGDAT, 1), (TRADES, 2)])
def test_an_update_makes_one_set_of_weight_gradients_for_each_outer_pass(make, passes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.ReLU(), nn.Linear(7, 3))
    images, labels = batch(count=5, dtype=torch.float32)
    with Products() as update:
        make(model, EPS, steps=4)(images, labels).backward()
    of_weights = [shape for shape in update.shapes if shape in ((7, 16), (3, 7))]
    assert sorted(of_weights) == passes * [(3, 7)] + passes * [(7, 16)]


def test_nothing_waits_for_a_gpu():
    """Fake tensors have no values: an inner attack that looked at one would raise an error."""
    with FakeTensorMode():
        model = vmoe()
        images, labels = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
        for norm in ("Linf", "L2"):
            found = pgd(model, images, labels, eps=EPS, steps=2, norm=norm, mode="train")
            assert found.shape == images.shape
        kl_pgd(model, images, eps=torch.tensor(EPS), steps=2)
        n_fgsm(model, images, labels, eps=EPS)


@pytest.mark.parametrize(
    "routing", [GatesOnly(), FrozenRouting(), RoutingDivergence(), AuxiliaryLoss()], ids=repr
)
def test_routing_modes_steer_the_inner_attack(routing):
    model = vmoe().double()
    images, labels = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.arange(3)
    start = images + EPS / 2
    plain = pgd(model, images, labels, eps=EPS, steps=2, start=start)
    steered = pgd(model, images, labels, eps=EPS, steps=2, start=start, routing=routing)
    assert not torch.equal(plain, steered)
    assert ((steered - images).abs() <= EPS).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bounds": (1, 0)}, "bounds must be .* with lowest < highest"),
        ({"bounds": 1}, "bounds must be .*, two numbers"),
        ({"bounds": None, "norm": "L1"}, "bounds must be finite for norm='L1'"),
    ],
)
def test_boxes_that_are_none(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pgd(linear(), *batch(), eps=EPS, **settings)
