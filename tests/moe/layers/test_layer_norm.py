"""The layer norm of ``VMoE`` is torch's, to the last bit of a first-order pass, and has derivatives
of every order."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ironmoe.moe.layers.layer_norm import LayerNorm

OPTIONS = {
    "affine": {}, "no bias": {"bias": False}, "no weight": {"elementwise_affine": False},
}  # fmt: skip
BACKWARD = "native_layer_norm_backward"


def pair(dtype=torch.float64, shape=6, **options):
    """Ours and torch's, with the same weights."""
    torch.manual_seed(0)
    ours, torchs = LayerNorm(shape, 1e-3, **options), nn.LayerNorm(shape, 1e-3, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    torchs.load_state_dict(ours.state_dict())
    return ours.to(dtype), torchs.to(dtype)


def rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)
    return x.to(dtype).requires_grad_()


def by_definition(x, layer):
    axes = tuple(range(-len(layer.normalized_shape), 0))
    y = (x - x.mean(axes, keepdim=True)) / (
        x.var(axes, correction=0, keepdim=True) + layer.eps
    ).sqrt()
    y = y if layer.weight is None else y * layer.weight
    return y if layer.bias is None else y + layer.bias


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


def penalty(y, x, wanted):
    (dx,) = torch.autograd.grad(y.sin().sum(), [x], create_graph=True)
    (hx,) = torch.autograd.grad(dx.square().sum(), [x], create_graph=True)
    return (dx, hx, *torch.autograd.grad(hx.square().sum(), wanted, allow_unused=True))


@pytest.mark.parametrize("shape", [6, (5, 6)])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_derivatives(options, shape):
    layer, _ = pair(shape=shape, **options)
    x = rows()
    wanted = [x, *layer.parameters()]
    exact = penalty(by_definition(x, layer), x, wanted)
    assert exact[2].abs().max() > 1
    torch.testing.assert_close(penalty(layer(x), x, wanted), exact)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_gradient_can_be_differentiated(options):
    layer, _ = pair(**options)
    names = [name for name, _ in layer.named_parameters()]

    def f(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = (rows(), *layer.parameters())
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_forward_mode_can_be_differentiated():
    layer, _ = pair()
    x, direction = rows(), torch.ones(6, dtype=torch.float64).cumsum(0)

    def along(f, x):
        return torch.func.jvp(f, (x,), (direction.expand_as(x),))[1]

    def exact(x):
        return by_definition(x, layer)

    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(along(exact, x).sin().sum(), wanted, allow_unused=True)
    with forward_ad.dual_level():
        dual = layer(forward_ad.make_dual(x, direction.expand_as(x).clone()))
        found = forward_ad.unpack_dual(dual).tangent
    for tangent in (along(layer, x), found):
        got = torch.autograd.grad(tangent.sin().sum(), wanted, allow_unused=True)
        torch.testing.assert_close(got[:2], expected[:2])
    twice = along(lambda x: along(layer, x), x)
    torch.testing.assert_close(twice, along(lambda x: along(exact, x), x))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_first_gradients_are_torchs_bits(dtype, options):
    found = []
    for layer in pair(dtype, **options):
        x = rows(dtype)
        y = layer(x)
        y.sin().sum().backward()
        with torch.no_grad():
            plain = layer(x)
        found.append([y, plain, x.grad, *(p.grad for p in layer.parameters())])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_weights_of_another_dtype_and_autocast_are_torchs_bits():
    found = []
    for layer in pair(torch.float32):
        x = rows(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        found.append((y, *torch.autograd.grad(y.float().sin().sum(), [x, *layer.parameters()])))
    for ours, torchs in zip(*found, strict=True):
        assert ours.dtype == torchs.dtype and torch.equal(ours, torchs)


@pytest.mark.parametrize("wants", ["x", "weight", "bias", "all"])
@pytest.mark.parametrize("leaf", [True, False])
def test_the_kernel_computes_what_is_asked_for(wants, leaf):
    layer, _ = pair()
    given = rows()
    x = given if leaf else given * 2
    of = {"x": [given], "weight": [layer.weight], "bias": [layer.bias]}
    y = layer(x)
    with Operations() as seen:
        torch.autograd.grad(y.sum(), of.get(wants, [given, *layer.parameters()]))
    ((_, arguments),) = [call for call in seen.calls if call[0] == BACKWARD]
    assert list(arguments[-1]) == [wants in (name, "all") for name in of]


def test_under_backward_all_of_it_is_computed():
    layer, _ = pair()
    x = rows()
    layer(x).square().sum().backward()
    assert all(t.grad is not None for t in (x, layer.weight, layer.bias))
    with Operations() as seen:
        y = layer(rows())
        torch.autograd.grad(y.sum(), [layer.weight], create_graph=True)
    assert BACKWARD not in [name for name, _ in seen.calls]


def test_no_more_is_kept_than_torch_keeps():
    kept = []
    for layer in pair(torch.float32):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.nbytes) or t, lambda t: t
        ):
            layer(rows(torch.float32))
            with torch.no_grad():
                layer(rows(torch.float32))
        kept.append(sorted(saved))
    assert kept[0] == kept[1]


def test_a_result_may_be_overwritten_as_torchs_may():
    gradients = []
    for layer in pair():
        x = rows()
        gradients.append(torch.autograd.grad(layer(x).mul_(2).sin().sum(), [x])[0])
    assert torch.equal(*gradients)


def test_it_is_torchs_to_whoever_looks():
    ours, torchs = pair()
    assert isinstance(ours, nn.LayerNorm) and repr(ours) == repr(torchs)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    x = rows()
    assert torch.equal(copy.deepcopy(ours)(x), torchs(x))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        ours(torch.ones(2, 1, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        torch.func.grad(lambda x: ours(x).sum())(torch.ones(2, 1, dtype=torch.float64))


def test_compiled_it_is_torchs_operation():
    layer, _ = pair()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(rows()), layer(rows()))
    assert [node.target for node in graphs[0].graph.nodes if node.op == "call_function"] == [
        nn.functional.layer_norm
    ]


def test_checkpointed_batched_and_mapped():
    layer, _ = pair()
    x = rows()
    exact = penalty(by_definition(x, layer), x, [x])
    got = penalty(checkpoint(layer, x, use_reentrant=False), x, [x])
    torch.testing.assert_close(got, exact)
    seeds = torch.randn(3, *x.shape, dtype=torch.float64)
    for create_graph in (False, True):
        got, expected = (
            torch.autograd.grad(
                y, [x, layer.weight], seeds, is_grads_batched=True, create_graph=create_graph
            )
            for y in (layer(x), by_definition(x, layer))
        )
        torch.testing.assert_close(got, expected)
    each = torch.func.vmap(torch.func.grad(lambda x: layer(x).sin().sum()))(x.detach())
    (expected,) = torch.autograd.grad(by_definition(x, layer).sin().sum(), x)
    torch.testing.assert_close(each, expected)
