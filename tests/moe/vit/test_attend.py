"""Attention has derivatives of every order and kind, and the plain first-order pass is torch's
own: the same bits, the same kernel, the same memory."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, hvp
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ironmoe.moe import VMoE, freeze_weights
from ironmoe.moe.routers.masks import for_softmax
from ironmoe.moe.vit import attend as attending
from ironmoe.moe.vit import attention
from ironmoe.moe.vit.attend import attend

B, H, N, D = 2, 3, 5, 4
KINDS = {
    "token": {}, "gap": {"classifier": "gap"}, "map": {"classifier": "map"},
    "dense": {"moe_layers": ()}, "dense map": {"moe_layers": (), "classifier": "map"},
    "conv": {"stem": "conv", "classifier": "gap"}, "ensemble": {"ensemble_size": 2},
}  # fmt: skip
MASK = torch.tensor([[True, True, False, True], [True, False, False, False]])


@pytest.fixture(params=["kernel on CPU", "any fused kernel"])
def route(request, monkeypatch):
    """How CPU tensors go, and how those of other devices go."""
    if request.param == "any fused kernel":
        monkeypatch.setattr(attending, "_cpu_kernel", lambda *tensors: None)
    return request.param


def model_of(kind="token", dtype=torch.float64):
    torch.manual_seed(0)
    settings = {"moe_layers": (1,), "num_experts": 4, "channels": 1} | KINDS[kind]
    model = VMoE(8, 4, 12, 2, 2, 16, 3, **settings).to(dtype).eval()
    nn.init.normal_(model.head.weight)
    # attention that is far from even, so that its derivatives show
    for name, parameter in model.named_parameters():
        if "qkv" in name or "kv" in name or "probe" in name:
            nn.init.normal_(parameter, std=0.7)
    return model


def images_of(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=generator).to(dtype)


def inputs(dtype=torch.float64, requires=(True, True, True)):
    torch.manual_seed(2)
    tensors = torch.randn(3, B, N, H, D, dtype=torch.float64).to(dtype).transpose(2, 3)
    mask = torch.rand(B, N) < 0.6
    mask[1] = False
    return [t.detach().requires_grad_(r) for t, r in zip(tensors, requires, strict=True)], mask


def native(q, k, v, mask_BN=None):
    mask = None if mask_BN is None else for_softmax(mask_BN)[:, None, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_definition(q, k, v, mask_BN=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask_BN is not None:
        scores = scores.where(for_softmax(mask_BN)[:, None, None], float("-inf"))
    return scores.softmax(-1) @ v


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operations(f):
    with Operations() as seen:
        f()
    return seen.names


def penalised(model, images, mask, wanted):
    """Gradients of a gradient penalty: what adversarial training against curvature asks for."""
    logits = model(images, mask)
    (dx,) = torch.autograd.grad(logits.sin().sum(), [images], create_graph=True)
    return torch.autograd.grad(dx.square().sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty_of_every_model_is_right(route, kind, masked, monkeypatch):
    model, images = model_of(kind), images_of().requires_grad_()
    mask = MASK if masked else None
    wanted = [images, *model.parameters()]
    got = penalised(model, images, mask, wanted)
    monkeypatch.setattr(attention, "attend", by_definition)
    for ours, exact in zip(got, penalised(model, images, mask, wanted), strict=True):
        assert (ours is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    assert got[0].abs().max() > 1e-3


def test_a_gradient_penalty_through_frozen_weights_is_right(route):
    model, images = model_of("map"), images_of().requires_grad_()
    trainable = penalised(model, images, None, [images])
    with freeze_weights(model):
        frozen = penalised(model, images, None, [images])
    torch.testing.assert_close(frozen, trainable, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_gradient_penalty_in_lower_precision_is_near(route, dtype, error):
    model, images = model_of("dense map"), images_of().requires_grad_()
    (exact,) = penalised(model, images, None, [images])
    low = images.detach().to(dtype).requires_grad_()
    (got,) = penalised(copy.deepcopy(model).to(dtype), low, None, [low])
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() < error * exact.abs().max()


@pytest.mark.parametrize("requires", [(True,) * 3, (False, True, False), (True, False, True)])
def test_derivatives_of_every_kind_of_input(route, requires):
    tensors, mask = inputs(requires=requires)
    for mask_BN in (None, mask):

        def attention(*tensors, mask=mask_BN):
            return attend(*tensors, mask)

        assert torch.autograd.gradcheck(attention, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(attention, tensors, fast_mode=True)


def test_a_third_derivative(route):
    (q, k, v), _ = inputs()

    def third(attention):
        value = attention(q, k, v).sin().sum()
        for _ in range(2):
            grads = torch.autograd.grad(value, [q, k, v], create_graph=True)
            value = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(value, [q, k, v])

    torch.testing.assert_close(third(attend), third(by_definition))


def test_inputs_that_depend_on_each_other(route):
    (q, _, _), _ = inputs()

    def second(attention):
        k = q * 2
        y = attention(q, k, k + q)
        (grad,) = torch.autograd.grad(y.sin().sum(), [q], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [q])

    torch.testing.assert_close(second(attend), second(by_definition))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_first_gradients_are_torchs_bits(route, masked, dtype):
    tensors, mask = inputs(dtype)
    mask = mask if masked else None
    y, expected = attend(*tensors, mask), native(*tensors, mask)
    dy = torch.randn_like(y)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    for got, want in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True
    ):
        assert torch.equal(got, want)


def test_a_first_order_pass_runs_the_fused_kernel_alone(route):
    tensors, _ = inputs(torch.float32)
    y = attend(*tensors)
    names = operations(lambda: torch.autograd.grad(y.sum(), tensors, retain_graph=True))
    fused = "_scaled_dot_product_flash_attention_for_cpu_backward"
    assert names.count(fused) == 1 and "bmm" not in names
    names = operations(lambda: torch.autograd.grad(y.sum(), tensors, create_graph=True))
    assert "bmm" in names
    assert names.count(fused) == (0 if route == "kernel on CPU" else 1)


def saved_during(f):
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        f()
    return saved


@pytest.mark.parametrize("masked", [False, True])
def test_no_more_is_kept_than_torch_keeps(route, masked):
    tensors, mask = inputs(torch.float32)
    mask = mask if masked else None
    ours = saved_during(lambda: attend(*tensors, mask))
    torchs = saved_during(lambda: native(*tensors, mask))
    if route == "kernel on CPU":
        assert sum(t.nbytes for t in ours) == sum(t.nbytes for t in torchs)
    places = {t.data_ptr() for t in ours if t.dtype != torch.bool}
    assert len(places) <= len({t.data_ptr() for t in torchs})
    with torch.no_grad():
        assert saved_during(lambda: attend(*tensors, mask)) == []


def test_what_was_kept_is_let_go_after_the_backward_pass(route):
    tensors, _ = inputs()
    y = attend(*tensors)
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    again = torch.autograd.grad(y.sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), tensors)


def test_a_result_that_was_overwritten_is_an_error_as_torchs_is(route):
    tensors, _ = inputs()
    y = attend(*tensors)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), tensors)


@pytest.mark.parametrize("kind", ["token", "dense map"])
def test_with_activation_checkpointing(route, kind):
    model, images = model_of(kind), images_of().requires_grad_()

    def checkpointed(images):
        tokens = model._tokens(model.stem(images))
        for block in model.blocks:
            tokens = checkpoint(block, tokens, use_reentrant=False)
        return model.head(model._pooled(model.norm(tokens)))

    found = []
    for forward in (model, checkpointed):
        first = torch.autograd.grad(forward(images).square().sum(), [images])
        grad = torch.autograd.grad(forward(images).square().sum(), [images], create_graph=True)[0]
        batched = torch.autograd.grad(
            forward(images), [images], torch.eye(3)[:, None].expand(3, 2, 3).double(),
            is_grads_batched=True,
        )  # fmt: skip
        found.append((*first, *torch.autograd.grad(grad.square().sum(), [images]), *batched))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def hessian_by_definition(f, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", by_definition)
        return hessian(f, x)


@pytest.mark.parametrize("kind", ["token", "map", "dense map"])
def test_forward_mode(route, kind):
    model, images = model_of(kind), images_of()
    tangent = torch.randn_like(images)
    step = 1e-6 * tangent
    expected = (model(images + step) - model(images - step)) / 2e-6
    assert expected.abs().max() > 0.05
    found = torch.func.jvp(model, (images,), (tangent,))[1]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with forward_ad.dual_level():
        dual = model(forward_ad.make_dual(images, tangent))
        found = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["token", "dense map"])
def test_every_second_derivative_is_the_same(route, kind, monkeypatch):
    model, image = model_of(kind), images_of()[:1]
    images = image[:, :, :3, 2:5].clone()  # few pixels, of two patches
    vector = torch.randn_like(images)

    def loss(few):
        return model(image + nn.functional.pad(few, (2, 3, 0, 5))).sin().sum()

    exact = hessian_by_definition(loss, images, monkeypatch)
    product = torch.einsum("bchwdeij,deij->bchw", exact.reshape(*images.shape * 2), vector)
    assert exact.abs().max() > 0.01
    found = {
        "hessian": hessian(loss, images),
        "hvp": hvp(loss, images, vector)[1],
        "jacrev twice": torch.func.jacrev(torch.func.jacrev(loss))(images),
        "grad twice": torch.func.grad(lambda x: (torch.func.grad(loss)(x) * vector).sum())(images),
        "forward over reverse": torch.func.jvp(torch.func.grad(loss), (images,), (vector,))[1],
    }
    if kind == "dense map":
        found["forward over reverse, mapped"] = torch.func.hessian(loss)(images)
        found["vectorised"] = hessian(loss, images, vectorize=True)
    for name, got in found.items():
        wanted = product if got.shape == images.shape else exact
        torch.testing.assert_close(
            got, wanted.reshape(got.shape), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["token", "dense map"])
def test_jacobians_and_vmap(route, kind):
    model, images = model_of(kind), images_of()
    each = torch.stack([model(image[None])[0] for image in images])
    torch.testing.assert_close(torch.func.vmap(lambda image: model(image[None])[0])(images), each)
    expected = torch.autograd.functional.jacobian(model, images)
    torch.testing.assert_close(torch.func.jacrev(model)(images), expected)
    vectorised = torch.autograd.functional.jacobian(model, images, vectorize=True)
    torch.testing.assert_close(vectorised, expected)


def test_under_autocast(route):
    model, images = model_of("dense map", torch.float32), images_of(torch.float32).requires_grad_()
    (exact,) = penalised(model, images, None, [images])
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = penalised(model, images, None, [images])
    assert (got - exact).abs().max() < 0.1 * exact.abs().max()


def test_an_empty_batch(route):
    tensors = [torch.randn(0, H, N, D, requires_grad=True) for _ in range(3)]
    y = attend(*tensors)
    (grad,) = torch.autograd.grad(y.sum(), tensors[:1], create_graph=True)
    assert y.shape == grad.shape == (0, H, N, D)
