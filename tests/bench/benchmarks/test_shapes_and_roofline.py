"""What the benchmark measures on: shapes and routings as their names say, and the roofline against
hand counts."""

import pytest
import torch

from ironmoe.bench.benchmarks.chosen_shapes import check_memory, select_shapes, shape_of
from ironmoe.bench.benchmarks.gpu.jobs import cases
from ironmoe.bench.benchmarks.gpus import H100, Rates
from ironmoe.bench.benchmarks.passes import (
    DX,
    FORWARD,
    FULL,
    INFERENCE,
    PASSES,
    PGD,
    UNFROZEN,
    saved_bytes,
)
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.roofline import (
    Work,
    bound_of,
    layer_work,
    limit_ms,
    moving_share,
    needed_flops,
    topk_work,
)
from ironmoe.bench.benchmarks.roofline_table import roofline_rows
from ironmoe.bench.benchmarks.shapes import (
    MAIN,
    REHEARSAL,
    ROUTINGS,
    SHAPES,
    Shape,
    dense_problem,
    make_problem,
)
from ironmoe.bench.common.user_error import UserError

CPU = torch.device("cpu")
GATED, BIASES = REHEARSAL


@pytest.mark.parametrize("shape", [*REHEARSAL, Shape("few", 4000, 8, 8, 16, 3)])
def test_routings_are_what_their_names_say(shape):
    loads = {}
    for name, routing in ROUTINGS.items():
        experts = routing(shape, CPU)
        assert experts.shape == (shape.tokens, shape.top_k) and experts.dtype == torch.int32
        assert name == "all_to_one" or all(len(set(row)) == shape.top_k for row in experts.tolist())
        loads[name] = experts.flatten().bincount(minlength=shape.num_experts).float()
    assert loads["all_to_one"][0] == shape.rows
    half = shape.num_experts // 2
    assert loads["half_empty"][half:].sum() == 0 and (loads["half_empty"][:half] > 0).all()
    if shape.name == "few":
        first = ROUTINGS["zipf"](shape, CPU)[:, 0].bincount(minlength=16) / shape.tokens
        chances = 1 / torch.arange(1, 17)
        torch.testing.assert_close(first, chances / chances.sum(), atol=0.03, rtol=0)
        torch.testing.assert_close(
            loads["uniform"] / shape.rows, torch.full((16,), 1 / 16), atol=0.01, rtol=0
        )


def test_frozen_shares_memory_and_dense_has_the_same_rows():
    problem = make_problem(BIASES, "uniform", torch.float32, CPU)
    frozen = problem.frozen()
    assert not any(p.requires_grad for p in frozen.parameters.values()) and all(
        p.requires_grad for p in problem.parameters.values()
    )
    assert frozen.w_in.data_ptr() == problem.w_in.data_ptr() and frozen.x is problem.x
    dense = dense_problem(problem).shape
    assert needed_flops(dense, FULL) == needed_flops(BIASES, FULL) and dense.tokens == BIASES.rows


def test_saved_bytes_of_frozen_experts_are_h_gates_and_indices():
    shape = GATED
    problem = make_problem(shape, "uniform", torch.float32, CPU)
    hidden, x, gates = 4 * shape.rows * shape.wide, 4 * shape.tokens * shape.dim, 4 * shape.rows
    frozen = saved_bytes(ironmoe, problem.frozen())
    assert hidden + gates <= frozen <= hidden + gates + 4 * 4 * shape.rows + 1024
    assert saved_bytes(ironmoe, problem) == frozen + x


def test_roofline_by_hand():
    """T, D, F, E, K = 4, 8, 16, 2, 2 with GELU and biases in bf16: R = 8 rows."""
    shape = Shape("hand", 4, 8, 16, 2, 2, "gelu", bias=True)
    product, weights, rows_d, rows_f, index = (
        2 * 8 * 8 * 16,
        2 * 8 * 16 * 2,
        8 * 8 * 2,
        8 * 16 * 2,
        8 * 4,
    )
    assert needed_flops(shape, FORWARD) == 2 * product
    assert (
        needed_flops(shape, DX) == needed_flops(shape, UNFROZEN) == 4 * product
        and needed_flops(shape, FULL) == 6 * product
    )
    inference = {w.kernel: w for w in layer_work(shape, INFERENCE)}
    assert inference["up product"][1:] == (product, rows_d + index + weights + rows_f)
    assert inference["down product"][1:] == (product, rows_f + weights + rows_d)
    assert inference["combine"][1:] == (0, rows_d + 4 * 8 * 2 + 2 * index)
    assert (
        inference["plan_dispatch"].bytes == 5 * index
        and topk_work(shape).bytes == 4 * 2 * 4 + 2 * index
    )
    # H
    assert {w.kernel: w for w in layer_work(shape, FORWARD)}["up product"].bytes == inference[
        "up product"
    ].bytes + rows_f
    full = {w.kernel: w for w in layer_work(shape, FULL)}
    assert full["hidden gradient"].bytes == rows_d + index + weights + 2 * rows_f + index + rows_f
    assert full["weight gradient in"][1:] == (product, rows_d + index + rows_f + weights)
    for name in (INFERENCE, FORWARD, DX, FULL, UNFROZEN, PGD):
        assert sum(w.flops for w in layer_work(shape, name)) == needed_flops(shape, name)
        assert limit_ms(shape, name) == pytest.approx(
            sum(max(w.flops / 790e12, w.bytes / 3e12) for w in layer_work(shape, name)) * 1e3
        )
        assert 0 < moving_share(shape, name) < 1


def test_a_layer_is_bound_by_what_bounds_its_kernels_for_most_of_the_time():
    """At 1 TFLOP/s and 1 TB/s, 10⁹ FLOPs or bytes take a millisecond."""
    rates = Rates(1.0, 1.0)
    long, short, shorter = (
        Work("a", 5_000_000_000, 1),
        Work("b", 0, 3_000_000_000),
        Work("c", 0, 1_000_000_000),
    )
    assert bound_of([long, short, shorter], rates) == "FLOPs"
    assert bound_of([long, short, short], rates) == "bytes"
    rows = roofline_rows((MAIN, Shape("one", 1, 8, 8, 8, 1)), {H100: rates}, every_kernel=False)
    assert {row["bound"] for row in rows if row["shape"] == MAIN.name} == {"FLOPs"}
    tiny = [row["bound"] for row in rows if row["shape"] == "one"]
    assert set(tiny) == {"bytes"} and len(tiny) == 5


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    problem = make_problem(GATED, "uniform", torch.float32, CPU)
    for name in (INFERENCE, FORWARD, DX, FULL, UNFROZEN):
        with FlopCounterMode(display=False) as counter:
            PASSES[name](ironmoe, problem)()
        assert counter.get_total_flops() == needed_flops(GATED, name), name


def test_shapes_are_named_once_and_read_by_name():
    names = [shape.name for shape in (*SHAPES, *REHEARSAL)]
    assert (
        len(set(names)) == len(names)
        and SHAPES[0] is MAIN
        and MAIN.sizes == (32768, 2048, 768, 128, 8)
    )
    assert [s.name for s in select_shapes("mixtral, olmoe", SHAPES)] == ["mixtral", "olmoe"]
    assert [s.name for s in select_shapes("MIXTRAL, Olmoe", SHAPES)] == ["mixtral", "olmoe"]
    assert select_shapes(None, SHAPES) == select_shapes([], SHAPES) == SHAPES
    assert select_shapes(None, SHAPES, REHEARSAL) == REHEARSAL
    planned = cases(SHAPES)
    assert (
        len(set(planned)) == len(planned)
        and {s for s, _ in planned} == set(SHAPES)
        and planned[0] == (MAIN, "uniform")
    )


def test_five_numbers_are_a_layer():
    (shape,) = select_shapes("788, 192,768,8,2", SHAPES)
    assert shape.sizes == (788, 192, 768, 8, 2)
    assert shape.activation == "swiglu" and not shape.bias
    assert shape.name == shape.numbers == shape.title == "788,192,768,8,2"
    assert MAIN.title == "qwen3-30b 32768,2048,768,128,8"
    assert shape_of(shape.name, SHAPES) == shape and shape_of("", SHAPES) is None
    several = ["788,192,768,8,2;olmoe", "mixtral", "788,192,768,8,2"]
    assert [s.name for s in select_shapes(several, SHAPES)] == [shape.name, "olmoe", "mixtral"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3,4", "five whole numbers T,d,n,E,K of at least 1, got '1,2,3,4'"),
        ("1,2,3,4,5,6", "got '1,2,3,4,5,6'"),
        ("1,2,0,4,1", "of at least 1, got '1,2,0,4,1'"),
        ("1,2,-3,4,1", "of at least 1"),
        ("1,2,3.5,4,1", "five whole numbers"),
        ("1,2,3,4,x", "five whole numbers"),
        ("1,2,3,4,1,olmoe", "repeat the option for more layers"),
        ("8,4,4,2,3", "K must be at most E, got K = 3 and E = 2 in '8,4,4,2,3'"),
        (
            "olmo",
            "'olmo' not among .*; did you mean olmoe.*; five numbers T,d,n,E,K describe another",
        ),
        ("", "'' not among"),
        ("olmoe;", "'' not among"),
    ],
)
def test_what_is_no_layer_is_named(text, message):
    with pytest.raises(UserError, match=message):
        select_shapes(text, SHAPES)


def test_a_layer_beyond_the_memory_is_refused():
    check_memory(REHEARSAL[0], 12)
    with pytest.raises(UserError, match=r"needs about .* GB, this machine has"):
        check_memory(MAIN._replace(num_experts=10**9), 12)
