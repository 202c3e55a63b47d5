"""Time the blocks that products have now in turns with those they had before, which shows what
changes of ``kernels/tuning.py`` are worth."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ironmoe.bench.benchmarks.block_tables import patched, table_of
from ironmoe.bench.benchmarks.gpu.run_log import Pen
from ironmoe.bench.benchmarks.gpu.tasks.products import work_of
from ironmoe.bench.benchmarks.gpu.tasks.tune import (
    CANDIDATE_SECONDS,
    PRESENT,
    objection,
    run_under,
    shape_for,
)
from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE, PASSES
from ironmoe.bench.benchmarks.peers import ironmoe
from ironmoe.bench.benchmarks.shapes import MAIN, Shape, make_problem
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.timing import OutOfTime, interleaved, time_limit
from ironmoe.kernels import tuning
from ironmoe.kernels.tuning import Blocks, chip_of

FORMER = "former"
NONE = "none"
# Table → product → its blocks before they were changed by what the compiler says of registers and
# shared memory. No GPU had timed them then. The other products kept theirs.
FORMER_BLOCKS = {
    "WIDE": {
        "gated": Blocks(128, 128, 64, split=2, box=False),  # gate and up came in two boxes
        "activated": Blocks(128, 128, 64, stages=4, split=4),  # one program a processor, now two
        "hidden_gradient": Blocks(128, 128, 64, split=4),  # 3 stages, now 5; H after the product
        "hidden_gradient_interleaved": Blocks(128, 128, 64, split=8),  # the same, in more parts
        "weight_gradient": Blocks(128, 128, 64),  # half of the columns; 3 stages, now 7
    },
    "BLACKWELL": {
        "gated": Blocks(128, 128, 64, split=2, box=False),
        "activated": Blocks(128, 128, 64, stages=4, split=8),
        "weight_gradient": Blocks(128, 128, 64),
    },
}
# Product → the pass of a layer that shows it.
SHOWN_BY = {
    "gated": INFERENCE,
    "activated": INFERENCE,
    "hidden_gradient": DX,
    "hidden_gradient_interleaved": DX,
    "weight_gradient": FULL,
}


def compare_blocks(
    dtype: torch.dtype,
    device: torch.device,
    left: Callable[[], float],
    pen: Pen,
    shape: Shape = MAIN,
    rounds: int = 20,
) -> bool:
    """Compare each product that has other blocks than before in the table of this chip and dtype:
    by itself, and in a pass of the layer.

    Returns:
        True if there was time for all.
    """
    compared = False
    for product, pass_name in SHOWN_BY.items():
        place = shape_for(product, shape)
        change = _change(product, place, dtype, device)
        compared |= change is not None
        if change is None or product in pen.done:
            continue

        if left() <= 0:
            return False

        pen.begin(product, "ironmoe")
        row = {"product": product, "shape": place.name, "dtype": dtype_name(dtype)}
        try:
            with time_limit(left()):
                found = _compare(change, pass_name, place, dtype, device, rounds)
        except OutOfTime:
            return False
        except Exception as error:  # former blocks may not compile: the row says so
            found = [{"why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}]

        pen.finish(product, blocks=[row | figures for figures in found])
        if device.type == "cuda":
            torch.cuda.empty_cache()

    if not compared and NONE not in pen.done:
        why = f"no blocks for {dtype} on this chip have changed"
        pen.finish(NONE, blocks=[{"product": NONE, "shape": shape.name, "why": why}])

    return True


class Change(NamedTuple):
    """The present and the former blocks of a product in a table of ``kernels/tuning.py``."""

    product: str
    table: str
    present: Blocks
    former: Blocks


def _change(product: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Change | None:
    """What has changed for a product; None where its blocks are those from before."""
    rows = tuning.rows_per_tile(shape.rows, shape.num_experts, dtype)
    table = table_of(product, dtype, rows, chip_of(torch.empty(0, device=device)))
    present: Blocks = getattr(tuning, table)[product]
    former = FORMER_BLOCKS.get(table, {}).get(product, present)
    return None if former == present else Change(product, table, present, former)


def _compare(
    change: Change,
    pass_name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for the product by itself and one for the pass, or one that says why there is none."""
    product, table, present, former = change
    run, _, _ = work_of(product, shape, dtype, device)
    differing = [name for name in Blocks._fields if getattr(present, name) != getattr(former, name)]
    described = {
        which: ", ".join(f"{name} {getattr(blocks, name)}" for name in differing)
        for which, blocks in ((PRESENT, present), (FORMER, former))
    }
    expected = run()
    launched = _launched(run)

    with patched(table, product, former):
        if why := objection(run, expected, dtype, lambda: CANDIDATE_SECONDS):
            return [described | {"why": f"the former blocks: {why}"}]
        if launched is not None and _launched(run) == launched:
            return [described | {"why": "the change of blocks reaches no launch"}]

    layer = PASSES[pass_name](ironmoe, make_problem(shape, "uniform", dtype, device))
    found = []
    for what, work in {"by itself": run, pass_name: layer}.items():
        both = {PRESENT: present, FORMER: former}
        runs = {name: run_under(table, product, blocks, work) for name, blocks in both.items()}
        times = {name: timing.ms for name, timing in interleaved(runs, device, rounds).items()}
        found.append({**described, "pass": what, "ms": times[PRESENT], "former_ms": times[FORMER]})

    return found


def _launched(run: Callable[[], Any]) -> list[Any] | None:
    """How each kernel of a call is compiled; None where the call launches none, as on CPU."""
    if find_spec("triton") is None:
        return None
    from ironmoe.kernels.gpu.launch import observe

    with observe() as launches:
        run()

    plain = (int, str, bool, tuple)
    return [
        (
            launch.num_warps,
            launch.num_stages,
            {name: a for name, a in launch.arguments.items() if isinstance(a, plain)},
        )
        for launch in launches
    ] or None
