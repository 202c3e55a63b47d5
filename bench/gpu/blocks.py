"""The blocks that products have now, in turns with those they had before: what changes of
``kernels/tuning.py`` bring.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ironmoe.bench.block_tables import patched, table_of
from ironmoe.bench.gpu.journal import Pen
from ironmoe.bench.gpu.tune import (
    CANDIDATE_SECONDS,
    PRESENT,
    objection,
    shape_for,
    with_blocks,
    work_of,
)
from ironmoe.bench.passes import DX, FULL, INFERENCE, PASSES
from ironmoe.bench.peers import ironmoe
from ironmoe.bench.shapes import MAIN, Shape, make_problem
from ironmoe.bench.timing import OutOfTime, interleaved, time_limit
from ironmoe.kernels import tuning
from ironmoe.kernels.tuning import Blocks

FORMER = "former"
# What changes of the blocks are measured against: product → (fields as they were, the pass of the
# layer that shows it). Nobody has timed either so far; the changes were made by what the compiler
# says of registers and shared memory.
FORMER_BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "activated": ({"m": 128, "n": 128, "k": 64, "stages": 4, "split": 4}, INFERENCE),
    "gated": ({"box": False}, INFERENCE),
    "hidden_gradient": ({"m": 128, "n": 128, "k": 64, "stages": 3, "split": 4, "preload": False}, DX),
    "weight_gradient": ({"m": 128, "n": 128, "k": 64, "stages": 2}, FULL),
}


def compare_blocks(
    dtype: torch.dtype,
    device: torch.device,
    left: Callable[[], float],
    pen: Pen,
    shape: Shape = MAIN,
    rounds: int = 20,
) -> bool:
    """Each product of ``FORMER_BLOCKS`` by itself, and the pass of the layer that it is in, with
    present and former blocks in turns.

    True if there was time for all.
    """
    for product, (changed, pass_name) in FORMER_BLOCKS.items():
        if product in pen.done:
            continue
        if left() <= 0:
            return False
        pen.begin(product, "ironmoe")
        place = shape_for(product, shape)
        row = {"product": product, "shape": place.name, "dtype": str(dtype).removeprefix("torch.")}
        try:
            with time_limit(left()):
                found = _compare(product, changed, pass_name, place, dtype, device, rounds)
        except OutOfTime:
            return False
        except Exception as error:  # what no longer compiles, or never did: its row says so
            found = [{"why": f"{type(error).__name__}: {error}".splitlines()[0][:200]}]
        pen.finish(product, blocks=[row | figures for figures in found])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _compare(
    product: str,
    changed: dict[str, Any],
    pass_name: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    run, chip, rows = work_of(product, shape, dtype, device)
    table = table_of(product, dtype, rows, chip)
    present: Blocks = getattr(tuning, table)[product]
    if unknown := changed.keys() - present._asdict().keys():
        return [{"why": f"Blocks have no {', '.join(sorted(unknown))}"}]
    former = present._replace(**changed)
    differing = [name for name, value in former._asdict().items() if getattr(present, name) != value]
    if not differing:
        return [{"why": f"the table has the former blocks: {present}"}]
    described = {
        which: ", ".join(f"{name} {getattr(blocks, name)}" for name in differing)
        for which, blocks in (("present", present), ("former", former))
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
        runs = {name: with_blocks(table, product, blocks, work) for name, blocks in both.items()}
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
    plain = (int, str, bool)
    return [
        (
            launch.num_warps,
            launch.num_stages,
            {name: a for name, a in launch.arguments.items() if isinstance(a, plain)},
        )
        for launch in launches
    ] or None
