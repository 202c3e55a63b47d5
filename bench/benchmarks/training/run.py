"""``ironmoe bench training``: do what is not done yet, print each result as it comes, keep it."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ironmoe.bench.benchmarks.training.inner import (
    DTYPES,
    LEGEND,
    InnerSettings,
    inner_table,
    measure_inner,
)
from ironmoe.bench.benchmarks.training.kept import Kept
from ironmoe.bench.benchmarks.training.models import MODELS
from ironmoe.bench.benchmarks.training.steps import PEER, has_peer
from ironmoe.bench.common.data import ImageData
from ironmoe.bench.common.files import write_json

PARTS = ("inner",)


class TrainingBenchmark(NamedTuple):
    """What is measured. parts: of PARTS; models: of MODELS; dtypes: of DTYPES, for the part
    ``inner``."""

    parts: Sequence[str] = PARTS
    models: Sequence[str] = tuple(MODELS)
    dtypes: Sequence[str] = tuple(DTYPES)
    inner: InnerSettings = InnerSettings()


def run_bench_training(
    benchmark: TrainingBenchmark,
    data: ImageData,
    folder: Path,
    out: Path | None,
    console: Console,
) -> None:
    """Measure the parts.

    Args:
        folder: where every finished piece of work is kept, and trained weights with it. Several
            processes may share it, each with other seeds.
        out: file for all rows, as JSON; it is written anew after each piece of work.

    Raises:
        UserError: the folder holds work that was done with other settings.
    """
    torch.set_flush_denormal(True)
    found: dict[str, Any] = {}
    for part in benchmark.parts:
        identity = {"data": data.name, "checksum": data.checksum}
        kept = Kept(folder / part, identity | benchmark.inner._asdict())
        for _ in _inner(benchmark, data, kept, console):
            found[part] = kept.all()
            if out is not None:
                write_json(out, found)


def _inner(
    benchmark: TrainingBenchmark, data: ImageData, kept: Kept, console: Console
) -> Iterator[None]:
    """Measure the steps of each model in each dtype."""
    for model, dtype in product(benchmark.models, benchmark.dtypes):
        name = f"{model}-{dtype}"
        measured = kept.read(name)
        if measured is None:
            console.print(f"{MODELS[model]}, {dtype} …", highlight=False)
            measured = kept.write(name, measure_inner(model, dtype, data, benchmark.inner))
        else:
            console.print(f"{kept.folder / name}.json was measured before:", highlight=False)
        console.print(inner_table(measured["rows"]))
        yield
    console.print(LEGEND, highlight=False)
    if not has_peer():
        console.print(f"Not installed here, so not measured: {PEER}.", highlight=False)
