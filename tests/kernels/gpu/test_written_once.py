"""Every kernel, at sizes on both sides of its blocks' edges: no byte is written by two programs."""

import ast
import inspect
import pkgutil
from importlib import import_module

import contract
import pytest
import torch
import written_once as written

from ironmoe.kernels.activations import ACTIVATIONS
from ironmoe.kernels.gpu import (
    attack_step,
    combine,
    dispatch,
    grouped_matmul,
    hidden_gradient,
    topk,
    weight_gradient,
)
from ironmoe.kernels.gpu.launch import observe
from ironmoe.kernels.tuning import CHIPS, INTERPRETER, assume
from ironmoe.kernels.types import Dispatch, ExpertGroups, GateRule

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")


INTERLEAVED = "clamped_swiglu_interleaved"


@pytest.fixture(autouse=True)
def _written_once(device):
    with written.written_once():
        yield


def products(counts, dim, hidden, act, dtype=torch.float16, transposed=False, top_k=2):
    """Every launch of the expert, with biases: ``counts`` rows an expert, and two rows of dropped
    choices.
    """
    experts = torch.cat([torch.full((n,), e) for e, n in enumerate([*counts, 2])]).int()
    experts = torch.nn.functional.pad(experts, (0, -len(experts) % top_k), value=len(counts)).view(
        -1, top_k
    )
    wide = 2 * hidden if ACTIVATIONS[act].gated else hidden
    x, dy, gates = (torch.randn(len(experts), n) for n in (dim, dim, top_k))
    w_in, w_out = torch.randn(len(counts), wide, dim), torch.randn(len(counts), dim, hidden)
    b_in, b_out = torch.randn(len(counts), wide), torch.randn(len(counts), dim)
    x, dy, w_in, w_out, b_in, b_out = (t.to(dtype) for t in (x, dy, w_in, w_out, b_in, b_out))
    if transposed:
        w_in, w_out = (w.mT.contiguous().mT for w in (w_in, w_out))

    offsets, row_token, row_slot, slot_row, _ = dispatch.plan(experts, len(counts))
    tiles = dispatch.plan_tiles(offsets, experts.numel(), dtype)
    plan = Dispatch(offsets, row_token, row_slot, slot_row)
    gathers = {"row_token": row_token, "activation": act, "precision": "ieee"}
    kept, units = grouped_matmul.grouped_matmul(x, w_in, b_in, offsets, tiles, **gathers)
    grouped_matmul.grouped_matmul(x, w_in, b_in, offsets, tiles, keep_hidden=False, **gathers)
    rows, _ = grouped_matmul.grouped_matmul(units, w_out, b_out, offsets, tiles, precision="ieee")
    combine.combine(rows, gates, slot_row)
    hidden_gradient.hidden_gradient(
        dy,
        gates,
        w_out,
        b_out,
        kept,
        plan,
        tiles=tiles,
        activation=act,
        precision="ieee",
        want_gates=True,
        want_hidden=True,
        want_gated=True,
    )
    grouped_matmul.grouped_matmul(kept, w_in.mT, None, offsets, tiles, precision="ieee")
    weight_gradient.weight_gradient(kept, None, x, row_token, offsets, "ieee")
    weight_gradient.weight_gradient(dy, row_token, units, None, offsets, "ieee")
    weight_gradient.expert_sum(kept, offsets)
    weight_gradient.expert_sum(dy, offsets, gates, row_token, row_slot)
    combine.combine_backward(
        dy, rows, gates, row_token, row_slot, slot_row, want_rows=True, want_gates=True
    )


def routes(tokens, num_experts, top_k, groups=None):
    """The router, forward and backward."""
    logits = torch.randn(tokens, num_experts)
    rule = GateRule("sigmoid", renormalize=True)
    gates, experts = topk.route(logits, top_k, rule, groups=groups)
    topk.route_backward(gates, logits, experts, rule)


def steps(examples, pixels):
    """Both steps of an attack, in place as well."""
    point, grad, low, high = (torch.rand(examples, pixels) for _ in range(4))
    radius, image = torch.rand(examples), torch.empty(examples, pixels, dtype=torch.float16)
    attack_step.launch_linf_step(point, grad, low, high, radius, moved=point, image=image)
    attack_step.launch_l2_step(
        point, grad, low, radius, (0.0, 1.0), radius, moved=point, image=image
    )


@pytest.mark.parametrize(
    ("act", "hidden"),
    [
        *(("swiglu", hidden) for hidden in (64, 192, 320, 129)),
        ("gelu", 320),
        (INTERLEAVED, 129),
        (INTERLEAVED, 192),
    ],
)
def test_products_of_wide_tiles(device, act, hidden):
    """128 rows a tile: an expert with more, one with none, one with fewer."""
    products([130, 0, 140], 48, hidden, act, transposed=hidden == 192)


@pytest.mark.parametrize(
    ("chip", "act"), [("sm_80", "swiglu"), ("sm_100", "swiglu"), ("sm_90", INTERLEAVED)]
)
def test_products_of_every_chip(device, chip, act):
    with assume(CHIPS[chip]._replace(processors=INTERPRETER.processors)):
        products([70, 128], 32, 192, act)


@pytest.mark.parametrize(
    ("counts", "dtype", "hidden"),
    [
        ([1], torch.float16, 31),
        ([15, 16, 17, 0], torch.float32, 65),
        ([31, 32, 33], torch.float32, 64),
        ([31, 32, 33], torch.float16, 65),
        ([64, 65], torch.float16, 33),
    ],
)
def test_products_of_small_tiles(device, counts, dtype, hidden):
    products(counts, 33, hidden, "swiglu", dtype)


@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_plans_and_sums(device, tokens):
    """Sizes around the choices that are ranked at once, and the rows and columns of a tile."""
    routing = contract.choose(tokens, 5, 2, drop=0.2)
    offsets, row_token, row_slot, slot_row, _ = dispatch.plan(routing.experts, 5)
    for dtype in (torch.float16, torch.float32):
        dispatch.plan_tiles(offsets, 2 * tokens, dtype)
    for dim in (1, 31, 1025):
        rows, dy = torch.randn(2 * tokens, dim), torch.randn(tokens, dim)
        combine.combine(rows, None, slot_row)
        combine.combine_backward(
            dy, rows, routing.gates, row_token, row_slot, slot_row, want_rows=True, want_gates=True
        )


@pytest.mark.parametrize("tokens", [1, 8, 257])
def test_routers(device, tokens):
    routes(tokens, 8, 2)
    routes(tokens, 255, 8)
    routes(tokens, 24, 3, ExpertGroups(4, 2))


@pytest.mark.parametrize("pixels", [1, 1023, 1024, 4097])
def test_attack_steps(device, pixels):
    steps(3, pixels)


def test_no_kernel_is_forgotten(device):
    """What these tests launch is all that ``ironmoe.kernels.gpu`` has, by the first argument of its
    calls of ``launch``.
    """
    package, launched = import_module("ironmoe.kernels.gpu"), set()
    for info in pkgutil.iter_modules(package.__path__):
        tree = ast.parse(inspect.getsource(import_module(f"ironmoe.kernels.gpu.{info.name}")))
        calls = (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        )
        launched |= {ast.unparse(call.args[0]) for call in calls if call.func.id == "launch"}
    with observe() as launches:
        products([3, 4], 8, 8, "swiglu")
        routes(3, 4, 2)
        steps(2, 5)
    assert {launch.kernel.__name__ for launch in launches} == launched
    assert len(launched) >= 15


@pytest.mark.parametrize("through_a_descriptor", [False, True])
def test_two_programs_that_write_one_byte_are_found(device, through_a_descriptor):
    """A store of 8 rows by each of two programs, which overlap in one; by one program it is none of
    this check's business.
    """
    import overlapping

    overlapping.write(through_a_descriptor, programs=2, step=8)
    overlapping.write(through_a_descriptor, programs=1, step=7)
    with pytest.raises(AssertionError, match="several programs write each of 64 bytes"):
        overlapping.write(through_a_descriptor, programs=2, step=7)
