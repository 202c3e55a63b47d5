"""Attacks on models whose optimum is known."""

import pytest
import torch
from pairwise import pairwise

from ironmoe.attacks import FGSM, PGD


class Linear(torch.nn.Module):
    """Two classes by the sign of w·x − b, on flattened images."""

    def __init__(self, dim, bias=0.0, dtype=torch.float32):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(dim, dtype=dtype))
        self.bias = bias

    def forward(self, x):
        score = x.flatten(1) @ self.weight.to(x.dtype) - self.bias
        return torch.stack([-score, score], dim=1)


def best_gain(weight, x, sign, eps, norm, bounds):
    """max sign·w·d over the ball and the box, in float64: how far an optimal attack moves the
    score."""
    direction = sign[:, None] * weight.double()
    room = torch.where(direction > 0, bounds[1] - x.double(), x.double() - bounds[0])
    size = direction.abs()
    if norm == "Linf":
        return (size * room.clamp_max(eps)).sum(1)
    low, high = (
        torch.zeros(len(x), dtype=torch.float64),
        torch.full((len(x),), 1e9, dtype=torch.float64),
    )
    for _ in range(200):  # d = min(λ|w|, room), ‖d‖ = eps
        middle = (low + high) / 2
        within = torch.minimum(middle[:, None] * size, room).norm(dim=1) <= eps
        low, high = torch.where(within, middle, low), torch.where(within, high, middle)
    return (size * torch.minimum(low[:, None] * size, room)).sum(1)


@pytest.mark.parametrize(
    ("norm", "bounds", "random_start", "loss"),
    pairwise(["Linf", "L2"], [(0.0, 1.0), (-1e6, 1e6)], [False, True], ["ce", "margin"]),
)
def test_pgd_reaches_the_optimum_of_a_linear_model(norm, bounds, random_start, loss):
    model = Linear(60)
    x = torch.rand(40, 3, 4, 5)
    model.bias = (x.flatten(1) @ model.weight).median().item()
    labels = model(x).argmax(1)
    eps = {"Linf": 0.2, "L2": 1.5}[norm]
    attack = PGD(
        model,
        eps,
        steps=60,
        norm=norm,
        bounds=bounds,
        random_start=random_start,
        loss=loss,
        early_stop=False,
    )
    result = attack.run(x, labels)
    sign = torch.where(labels == 1, -1.0, 1.0).double()
    gain = sign * ((result.adversarial.double() - x.double()).flatten(1) @ model.weight.double())
    best = best_gain(model.weight.detach(), x.flatten(1), sign, eps, norm, bounds)
    ratio = gain / best
    assert ratio.max() <= 1 + 1e-5
    assert ratio.min() >= 1 - 1e-4
    margin = (model(x)[:, 1] - model(x)[:, 0]).double().abs() / 2
    decided = (margin - best).abs() > 1e-3 * best
    assert torch.equal(result.success[decided], (best > margin)[decided])
    assert bool(result.success.any()) and (result.distance <= eps).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fgsm_is_one_full_step(norm):
    model = Linear(12)
    # near the box's faces too: the step is clipped there, not lengthened elsewhere
    x = torch.rand(9, 12)
    labels = model(x).argmax(1)
    adversarial = FGSM(model, 0.1, norm=norm)(x, labels)
    sign = torch.where(labels == 1, -1.0, 1.0)[:, None]
    weight = model.weight.detach()
    step = sign * (weight.sign() if norm == "Linf" else weight / weight.norm())
    torch.testing.assert_close(adversarial, (x + 0.1 * step).clamp(0, 1), rtol=0, atol=1e-5)


def test_first_closed_form_of_the_papers_code():
    """One update of eps 0.1 on ‖x − y‖²; a zero gradient leaves the image as it is."""
    x = torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.1, 0.3]])
    y = torch.tensor([[0.2, 0.0, 0.0], [0.0, 0.1, 0.3]])
    attack = PGD(
        lambda images: images, 0.1, alpha=0.1, steps=1, random_start=False, early_stop=False,
        bounds=(-10, 10),
        loss=lambda logits, labels: (logits - y).square().sum(1),
    )  # fmt: skip
    torch.testing.assert_close(
        attack(x, torch.tensor([1, 2])), torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.1, 0.3]])
    )


def test_second_closed_form_of_the_papers_code():
    """Adversarial training of w·x on squared error: 10 updates of eps 0.1 in all, then SGD with
    rate 0.1, gives w = 1.396."""
    w = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(w.weight)
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[-2.0], [0.0], [2.0]])
    attack = PGD(
        w, 0.1, alpha=0.01, steps=10, random_start=False, early_stop=False, bounds=(-10, 10),
        loss=lambda logits, labels: (logits - y).square().sum(1),
    )  # fmt: skip
    adversarial = attack(x, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(adversarial, torch.tensor([[-0.9], [0.0], [0.9]]))
    optimizer = torch.optim.SGD(w.parameters(), lr=0.1)
    (w(adversarial) - y).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(w.weight.detach(), torch.tensor([[1.396]]))


def test_success_grows_with_eps_steps_and_restarts():
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(30, 40), torch.nn.GELU(), torch.nn.Linear(40, 4)
    )
    x = torch.rand(200, 30)
    labels = model(x).argmax(1)

    def share(**options):
        return (
            PGD(model, **{"eps": 0.05, "steps": 10} | options)
            .run(x, labels)
            .success.float()
            .mean()
            .item()
        )

    by_eps = [share(eps=e) for e in (0.0, 0.01, 0.03, 0.1, 0.6)]
    assert by_eps[0] == 0 and by_eps == sorted(by_eps) and by_eps[-1] == 1
    random_noise = share(steps=0)
    assert random_noise <= share(steps=1) <= share(steps=20)
    assert share(steps=2, restarts=5) >= share(steps=2)
