"""Second and third derivatives of every kind of model, by every way that torch has to take them:
right, wherever they are not an error."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jvp

from ironmoe.moe import SoftMoE, VMoE

# fewer pixels would make the central differences no better, and one image is enough
CONV = {"stem": "conv", "patch_size": 4, "image_size": 8}
KINDS = {
    "token": {"classifier": "token"}, "masked gap, renormalised": {"router": {"renormalize": True}},
    "masked map": {"classifier": "map"}, "masked ensemble": {"ensemble_size": 2},
    "dense": {"moe_layers": ()}, "conv": CONV | {"representation_size": 5},
    "soft": {"make_moe": lambda: SoftMoE(12, 16, 4, 2, activation="gelu_tanh")},
    "sigmoid": {"router": {"score": "sigmoid", "order": "topk_first", "softcap": 2.0}},
}  # fmt: skip
MASK = torch.tensor([[True, True, False, True]])
STEP = 1e-5


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """(f of an image, image, direction, second derivative in it, third in it twice)."""
    torch.manual_seed(0)
    options = {"moe_layers": (0,), "num_experts": 4, "channels": 1, "classifier": "gap"}
    options |= {"image_size": 6, "patch_size": 3} | KINDS[request.param]
    model = VMoE(dim=12, depth=1, heads=2, mlp_dim=16, num_classes=3, **options)
    nn.init.normal_(model.head.weight)
    # sharp attention and routers, so that their derivatives show
    for name, parameter in model.named_parameters():
        if "qkv" in name or "kv" in name or "router" in name:
            nn.init.normal_(parameter, std=0.6)
    model.double().eval()
    mask = MASK if "masked" in request.param else None
    image = 0.1 + 0.8 * torch.rand(1, 1, model.image_size, model.image_size, dtype=torch.float64)
    direction = torch.randn_like(image)
    weights = torch.randn(3, dtype=torch.float64)

    def f(image):
        return (model(image, mask)[0] * weights).sin().sum()

    second = slope(lambda x: torch.autograd.grad(f(x), x)[0], image, direction)
    third = slope(lambda x: by_autograd(f, x, direction, 2), image, direction)
    assert second.abs().max() > 0.1 and third.abs().max() > 0.1
    return f, image, direction, second, third


def slope(g, x, direction):
    """Central differences of a gradient."""
    ends = (g((x + sign * STEP * direction).requires_grad_()) for sign in (1, -1))
    return (next(ends) - next(ends)) / (2 * STEP)


def by_autograd(f, x, direction, order):
    """The gradient of the (order − 1)-th derivative of f in the direction."""
    x = x.detach().requires_grad_()
    value = f(x)
    for _ in range(order - 1):
        value = (torch.autograd.grad(value, x, create_graph=True)[0] * direction).sum()
    return torch.autograd.grad(value, x)[0]


def tangent(f, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent


def reverse_over_dual(f, x, direction):
    def along(x):
        return tangent(f, x, direction)

    return by_autograd(along, x, direction, 1), by_autograd(along, x, direction, 2)


def dual_over_reverse(f, x, direction):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.detach().requires_grad_(), direction)
        return (forward_ad.unpack_dual(torch.autograd.grad(f(x), x)[0]).tangent,)


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_plain_autograd(case):
    f, x, direction, second, third = case
    close(by_autograd(f, x, direction, 2), second)
    close(by_autograd(f, x, direction, 3), third)


def test_dual_tensors(case):
    f, x, direction, *wanted = case
    for way in (reverse_over_dual, dual_over_reverse):
        for got, exact in zip(way(f, x, direction), wanted, strict=False):
            close(got, exact)


@pytest.mark.parametrize("ways", ["gj", "jj", "jg", "gg", "ggg", "gjg", "jgj", "gjj"])
def test_nested_transforms(case, ways):
    """Written as they are nested: "gj" is grad of jvp."""
    f, x, direction, second, third = case
    wanted = second if len(ways) == 2 else third
    for i, way in enumerate(reversed(ways)):
        f = derivative(f, direction, way, scalar=i < len(ways) - 1)
    close(f(x), wanted if ways[0] == "g" else (wanted * direction).sum())


def derivative(f, direction, way, *, scalar):
    """Of f in the direction; the whole gradient where it need not be a scalar."""
    if way == "j":
        return lambda x: jvp(f, (x,), (direction,))[1]
    if scalar:
        return lambda x: (grad(f)(x) * direction).sum()
    return grad(f)


def test_reverse_over_a_functional_tangent(case):
    """A penalty on a Jacobian as one trains with it: torch.func within plain autograd."""
    f, x, direction, second, third = case

    def along(x):
        return jvp(f, (x,), (direction,))[1]

    close(by_autograd(along, x, direction, 1), second)
    close(by_autograd(along, x, direction, 2), third)
