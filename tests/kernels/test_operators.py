"""The registered operators ``ironmoe::…`` in torch's own machinery, with the twins and with the
kernels as their bodies."""

import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from ironmoe.kernels import (
    Routing,
    combine,
    expert_mlp,
    grouped_matmul,
    linf_step,
    plan_dispatch,
    topk_route,
)
from ironmoe.kernels.dispatch import plan_tiles
from ironmoe.moe import MoE

T, D, F, E, K = 10, 16, 24, 4, 2
OPERATORS = torch.ops.ironmoe


@pytest.fixture(params=["twin", "kernel"])
def where(request):
    """The device on which operators run, their bodies being the twins or the kernels."""
    return request.getfixturevalue("device") if request.param == "kernel" else "cpu"


def leaf(*shape, device, dtype=torch.float32):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def plan(device, dropped=True):
    experts = torch.randint(E + dropped, (T, K), device=device, dtype=torch.int32)
    dispatch = plan_dispatch(experts, E)
    return experts, dispatch, plan_tiles(dispatch.offsets, T * K, torch.float32)


def operator_calls(device):
    """(operator, arguments) of each."""
    experts, dispatch, tiles = plan(device)
    offsets, row_token, row_slot, slot_row = dispatch

    def new(*shape):
        return leaf(*shape, device=device)

    def plain(*shape):
        return torch.randn(*shape, device=device)

    yield (
        OPERATORS.topk_route,
        (new(T, E), K, "softmax", "score_first", True, None, 1, 1, "max", 1.0),
    )
    yield (
        OPERATORS.topk_route,
        (new(T, E), 1, "sigmoid", "score_first", False, plain(E), 2, 1, "top2_sum", 2.5),
    )
    gates, chosen = topk_route(plain(T, E), K)
    yield (
        OPERATORS.topk_route_backward,
        (plain(T, K), plain(T, E), chosen, "softmax", "score_first", False, 1.0),
    )
    yield OPERATORS.plan_dispatch, (experts, E, None)
    yield OPERATORS.plan_dispatch, (experts, E, torch.float32)
    yield OPERATORS.plan_tiles, (offsets, T * K, torch.float32)
    up = (new(T, D), new(E, F, D), new(E, F), offsets, tiles, row_token, slot_row)
    yield OPERATORS.grouped_matmul, (*up, "gelu", True, "ieee")
    yield OPERATORS.grouped_matmul, (*up, "swiglu", True, "ieee")
    without_tiles = (
        *up[:4],
        None,
        *up[5:],
    )  # as in an exported program: the tiles are planned inside
    yield OPERATORS.grouped_matmul, (*without_tiles, "gelu", True, "ieee")
    yield OPERATORS.grouped_matmul, (*up, "clamped_swiglu_interleaved", True, "ieee")
    yield (
        OPERATORS.grouped_matmul,
        (new(T * K, D), new(E, F, D), None, offsets, tiles, None, None, "none", True, "ieee"),
    )
    detached = [t.detach() for t in up]
    yield OPERATORS.grouped_matmul, (*detached, "gelu", False, "ieee")
    down = (
        gates.detach().requires_grad_(),
        new(E, D, F),
        new(E, D),
        new(T * K, F),
        plain(T * K, F),
        offsets,
        tiles,
    )
    yield OPERATORS.expert_down, (*down, row_token, row_slot, slot_row, "gelu", "ieee")
    down = (
        gates.detach().requires_grad_(),
        new(E, D, F),
        new(E, D),
        new(T * K, 2 * F),
        plain(T * K, F),
        offsets,
        tiles,
    )
    yield (
        OPERATORS.expert_down,
        (*down, row_token, row_slot, slot_row, "clamped_swiglu_interleaved", "ieee"),
    )
    yield (
        OPERATORS.combine,
        (new(T * K, D), gates.detach().requires_grad_(), row_token, row_slot, slot_row),
    )
    weights, index = (plain(E, D, F), plain(E, D)), (row_token, row_slot, slot_row)
    for want in (True, False):
        yield (
            OPERATORS.grouped_matmul_backward,
            (
                plain(T * K, F),
                plain(T, D),
                plain(E, F, D),
                offsets,
                tiles,
                row_token,
                slot_row,
                "ieee",
                want,
                not want,
                want,
            ),
        )
        yield (
            OPERATORS.expert_down_backward,
            (
                plain(T, D),
                gates,
                *weights,
                plain(T * K, F),
                offsets,
                tiles,
                *index,
                "gelu",
                "ieee",
                want,
                not want,
                want,
                not want,
            ),
        )
        yield (
            OPERATORS.combine_backward,
            (plain(T, D), plain(T * K, D), gates, row_token, row_slot, slot_row, want, not want),
        )
    image, per_example = plain(3, 2, 4), plain(3).abs()
    yield (
        OPERATORS.linf_step,
        (image, image.half(), image - 1, image + 1, per_example, torch.bfloat16),
    )
    yield (
        OPERATORS.l2_step,
        (image, image, image.clamp(0, 1), per_example, 0.0, 1.0, per_example, torch.float32),
    )


NUM_CALLS = 23
EVERY_UTILITY = (
    "test_schema",
    "test_faketensor",
    "test_autograd_registration",
    "test_aot_dispatch_dynamic",
)


def test_every_operator_is_called_below():
    called = {operator._qualified_op_name for operator, _ in operator_calls("cpu")}
    registered = {
        name.split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("ironmoe::")
    }
    assert called == registered
    assert len(list(operator_calls("cpu"))) == NUM_CALLS


@pytest.mark.parametrize("number", range(NUM_CALLS))
def test_opcheck(where, number):
    """Schema and fake tensors for every call; what belongs to the registration, once an
    operator."""
    calls = list(operator_calls(where))
    operator, arguments = calls[number]
    first = all(operator is not earlier for earlier, _ in calls[:number])
    opcheck(operator.default, arguments, test_utils=EVERY_UTILITY if first else EVERY_UTILITY[:2])


def compiled(f, **options):
    torch._dynamo.reset()
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    return torch.compile(f, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize(
    ("where", "activation"),
    [
        ("twin", "gelu"),
        ("twin", "clamped_swiglu_interleaved"),
        ("kernel", "gelu"),
        ("kernel", "swiglu"),
    ],
    indirect=["where"],
)
def test_compiled_in_one_graph_gives_the_same_gradients(where, activation):
    layer = MoE(D, F, E, K, activation=activation).to(where)
    layer.router.noise_std = 0.0
    x = leaf(T, D, device=where)
    wanted = [x, *layer.parameters()]
    compiled_layer = compiled(layer)
    for got, want in zip(
        torch.autograd.grad(compiled_layer(x).sum(), wanted),
        torch.autograd.grad(layer(x).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_compiled_attack_step_gives_the_same_image(where):
    layer = MoE(D, F, E, K).to(where).eval()
    images = torch.rand(T, D, device=where)
    alpha = torch.full((T,), 0.01, device=where)

    def step(point):
        point = point.detach().requires_grad_()
        (grad,) = torch.autograd.grad(layer(point).square().sum(), [point])
        return linf_step(point.detach(), grad, images - 0.03, images + 0.03, alpha)[0]

    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(images), step(images))


def test_another_batch_size_compiles_nothing_new(where):
    layer = MoE(D, F, E, K).to(where).eval()
    compilations = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend=compilations, dynamic=True)
    seen = []
    with torch.no_grad():
        for tokens in (8, 9, 31):  # up to 32: beyond, an expert's average rows ask for larger tiles
            x = torch.randn(tokens, D, device=where)
            torch.testing.assert_close(run(x), layer(x))
            seen.append(compilations.frame_count)
    assert len(set(seen)) == 1


def everything(x, leaves, routing, activation="gelu"):
    return expert_mlp(
        x,
        leaves["w_in"],
        leaves["w_out"],
        routing,
        b_in=leaves["b_in"],
        b_out=leaves["b_out"],
        activation=activation,
    )


def expert_leaves(device, dtype=torch.float32, wide=F):
    shapes = {"w_in": (E, wide, D), "w_out": (E, D, F), "b_in": (E, wide), "b_out": (E, D)}
    return {name: leaf(*shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones():
    with FakeTensorMode():
        x, leaves, logits = leaf(T, D, device="cpu"), expert_leaves("cpu"), leaf(T, E, device="cpu")
        routing = topk_route(logits, K)
        y = everything(x, leaves, routing)
        grads = torch.autograd.grad(y.sum(), [x, logits, *leaves.values()])
        moved, image = linf_step(
            x.detach(),
            x.detach(),
            x.detach(),
            x.detach(),
            torch.zeros(T),
            image_dtype=torch.float16,
        )
    assert routing.experts.dtype == torch.int32 and routing.gates.shape == (T, K)
    assert y.shape == (T, D)
    assert [g.shape for g in grads] == [x.shape, logits.shape, *(t.shape for t in leaves.values())]
    assert moved.shape == image.shape == (T, D) and image.dtype == torch.float16


def test_meta_tensors_go_through_forward_and_backward():
    layer = MoE(D, F, E, K, device="meta")
    x = torch.empty(T, D, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (T, D) and y.is_meta
    assert layer.fc1.weight.grad.shape == (E, F, D)
    rows = torch.empty(T * K, D, device="meta")
    dispatch = plan_dispatch(torch.empty(T, K, device="meta", dtype=torch.int32), E)
    assert grouped_matmul(rows, layer.fc1.weight, dispatch.offsets).shape == (T * K, F)
    assert combine(
        rows, Routing(torch.empty(T, K, device="meta"), torch.empty(0)), dispatch
    ).shape == (T, D)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_casts_tokens_and_weights_and_leaves_gates_alone(where, dtype):
    if dtype == torch.bfloat16 and where == "cpu":
        pytest.skip(
            "tl.dot of bfloat16 is wrong in Triton's interpreter; the twin's autocast is tested "
            "in test_expert_mlp"
        )
    x, leaves, logits = leaf(T, D, device=where), expert_leaves(where), leaf(T, E, device=where)
    with torch.autocast(where, dtype=dtype):
        routing = topk_route(logits, K)
        y = everything(x, leaves, routing)
    assert y.dtype == dtype and routing.gates.dtype == torch.float32
    by_hand = everything(x.to(dtype), {name: t.to(dtype) for name, t in leaves.items()}, routing)
    assert torch.equal(y, by_hand)
    wanted = [x, logits, *leaves.values()]
    grads = torch.autograd.grad(y.float().sum(), wanted, retain_graph=True)
    assert all(g.dtype == torch.float32 for g in grads)
    for got, want in zip(grads, torch.autograd.grad(by_hand.float().sum(), wanted), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("order", ["ironmoe.kernels first", "torch.utils.flop_counter first"])
def test_flops_are_known_whichever_is_imported_first(order):
    modules = ["ironmoe.kernels", "torch.utils.flop_counter"]
    names = "; ".join(
        f"import {name}" for name in sorted(modules, key=lambda name: name not in order)
    )
    code = (
        f"import torch; {names}; print(torch.ops.ironmoe.grouped_matmul in "
        "torch.utils.flop_counter.flop_registry)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "True\n"
    )


@pytest.mark.parametrize(
    ("activation", "halves"), [("gelu", 1), ("swiglu", 2), ("clamped_swiglu_interleaved", 2)]
)
def test_flops_count_the_products_that_run(device, activation, halves):
    x, leaves, routing = (
        leaf(T, D, device=device),
        expert_leaves(device, wide=halves * F),
        topk_route(torch.randn(T, E, device=device), K),
    )
    product = 2 * T * K * D * F
    with FlopCounterMode(display=False) as forward:
        loss = everything(x, leaves, routing, activation).sum()
    with FlopCounterMode(display=False) as input_only:
        torch.autograd.grad(loss, [x], retain_graph=True)
    with FlopCounterMode(display=False) as full:
        torch.autograd.grad(loss, [x, *leaves.values()])
    assert forward.get_total_flops() == (halves + 1) * product
    assert input_only.get_total_flops() == (halves + 1) * product
    assert full.get_total_flops() == 2 * (halves + 1) * product


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
class TestCudaGraph:
    """Nothing waits for the host and no shape depends on values, so a graph can be replayed on
    other values."""

    def capture(self, f):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                f()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = f()
        return graph, outputs

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_forward_and_backward(self, dtype):
        layer = MoE(64, 96, 8, 2, device="cuda", dtype=dtype).eval()
        x = torch.randn(200, 64, device="cuda", dtype=dtype, requires_grad=True)
        wanted = [x, *layer.parameters()]

        def run():
            y = layer(x)
            return y, *torch.autograd.grad(y.float().square().sum(), wanted)

        graph, outputs = self.capture(run)
        for _ in range(3):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            graph.replay()
            assert all(torch.equal(got, want) for got, want in zip(outputs, run(), strict=True))

    def test_a_pgd_step(self):
        layer = MoE(64, 96, 8, 2, device="cuda").eval()
        images = torch.rand(32, 64, device="cuda")
        point, low, high = images.clone(), images - 0.1, images + 0.1
        alpha = torch.full((32,), 0.02, device="cuda")

        def step():
            x = point.detach().requires_grad_()
            (grad,) = torch.autograd.grad(layer(x).square().sum(), [x])
            return linf_step(point, grad, low, high, alpha)[0]

        graph, moved = self.capture(step)
        for _ in range(5):
            graph.replay()
            assert torch.equal(moved, step())
            point.copy_(moved)

    def test_nothing_waits_for_the_host(self):
        layer = MoE(64, 96, 8, 2, device="cuda").eval()
        x = torch.randn(200, 64, device="cuda", requires_grad=True)
        torch.autograd.grad(layer(x).sum(), [x])
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
        finally:
            torch.cuda.set_sync_debug_mode("default")
