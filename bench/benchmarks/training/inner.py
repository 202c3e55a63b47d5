"""The part ``inner``: what one training step costs, in products and in milliseconds.

All ways to make a step take turns in one process. Their adversarial images are compared before
their times.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from ironmoe.bench.benchmarks.training.models import MODELS, new_model
from ironmoe.bench.benchmarks.training.products import Products, count_products
from ironmoe.bench.benchmarks.training.steps import COMMON, Contender, contenders
from ironmoe.bench.common.rows.found import are_ascending_times, is_count
from ironmoe.bench.common.timing import MIN_ROUNDS, WARMUP, interleaved
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.reports.tables import (
    Column,
    cells,
    headers,
    markdown_table,
    terminal_table,
)
from ironmoe.moe import collect_aux_loss

CPU = torch.device("cpu")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
BEGINNING = 10  # steps of plain training
UNTIMED = 2  # rounds: one for adversarial images, one for products
# Rounding at the edge of a ball makes no other image. A step in the other direction does: it is
# 2 · alpha long.
SAME_PIXEL = 1e-5
# A ratio is printed if this share of the pixels is the same. Where a gradient is nearly 0, its sign
# depends on rounding, and bfloat16 rounds more.
AGREES = {"float32": 0.99, "bfloat16": 0.9}
LEGEND = (
    "same: pixels that are those of the common loop. passes: products of forward passes, of "
    "gradients of images and of weights, each as a multiple of one forward pass. ms: of a step, "
    "the median. ratio: the time of the common loop over this time; limit: what the passes allow."
)
Row = dict[str, Any]


class InnerSettings(NamedTuple):
    """eps: in units of the pixel range; batch_size: images of a step; runs: steps of each
    contender, of which the median counts; seconds: after these no new round begins once there were
    three."""

    eps: float = 0.1
    batch_size: int = 100
    runs: int = 15
    seconds: float = 600.0


def measure_inner(name: str, dtype: str, data: ImageData, settings: InnerSettings) -> list[Row]:
    """A row for each way to make a step, with one of MODELS in one of DTYPES."""
    chosen = data.split()[0][: settings.batch_size]
    images, labels = data.images[chosen], data.labels[chosen]
    model = _begun(new_model(name, data, seed=0), images, labels)
    by_name = {one.name: one for one in contenders(model, settings.eps, DTYPES[dtype])}

    made = {key: one.adversarial(images, labels) for key, one in by_name.items()}
    products = {key: _products(one, images, labels) for key, one in by_name.items()}
    turns = {key: partial(one.step, images, labels) for key, one in by_name.items()}
    times = interleaved(turns, CPU, settings.runs, settings.seconds)

    rows = []
    for key, one in by_name.items():
        common = f"{key.split(', ')[0]}, {COMMON}"
        equal = _equal_pixels(made[key], made.get(common))
        agrees = equal is not None and equal >= AGREES[dtype]
        rows.append(
            {
                "model": name,
                "dtype": dtype,
                "step": key,
                "updates": one.updates,
                "equal_pixels": equal,
                "products": products[key]._asdict(),
                "units": sum(products[key]),
                "ms": times[key].ms,
                "p20": times[key].p20,
                "p80": times[key].p80,
                "runs": times[key].runs,
                "ratio": times[common].ms / times[key].ms if agrees else None,
                "limit": sum(products[common]) / sum(products[key]) if agrees else None,
            }
        )
    return rows


def expected_seconds(name: str, dtype: str, data: ImageData, settings: InnerSettings) -> float:
    """About, of ``measure_inner``: from the time of one step that has two passes."""
    chosen = data.split()[0][: settings.batch_size]
    images, labels = data.images[chosen], data.labels[chosen]
    model = new_model(name, data, seed=0)
    ways = contenders(model, settings.eps, DTYPES[dtype])
    one = next(way for way in ways if _passes(way) == 2)
    seconds = 0.0
    for _ in range(2):  # the first one makes what the second finds
        start = time.perf_counter()
        one.step(images, labels)
        seconds = (time.perf_counter() - start) / _passes(one)

    of_round = seconds * sum(map(_passes, ways))
    rounds = min(settings.runs, max(MIN_ROUNDS, int(settings.seconds / max(of_round, 1e-9))))
    return seconds * BEGINNING + of_round * (rounds + WARMUP + UNTIMED)


def are_whole(rows: Sequence[Row]) -> bool:
    """Whether rows have their figures, and possible ones."""
    return bool(rows) and all(
        are_ascending_times(map(row.get, ("p20", "ms", "p80"))) and is_count(row.get("runs"))
        for row in rows
    )


def _passes(way: Contender) -> int:
    """Of the model, forward and backward, in a step: one for each step of an inner attack, and one
    for the update. A step of several updates makes its attack out of them."""
    return way.updates if way.updates > 1 else way.settings.steps + 1


def _begun(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    """The model after a few steps of plain training. New models have a last layer of zeros, and so
    no gradient at the images."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(BEGINNING):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels) + collect_aux_loss(model)
        loss.backward()
        optimizer.step()
    return model


def _equal_pixels(made: Tensor | None, common: Tensor | None) -> float | None:
    """The share of the pixels that are the same."""
    if made is None or common is None:
        return None
    return float(((made - common).abs() <= SAME_PIXEL).double().mean())


def _products(contender: Contender, images: Tensor, labels: Tensor) -> Products:
    """The products of a step, in forward passes of the batch."""
    dtype = contender.settings.dtype

    def forward() -> None:
        contender.model.eval()
        with torch.no_grad(), torch.autocast("cpu", enabled=dtype is not None, dtype=dtype):
            contender.model(images)

    one = count_products(contender.model, forward).forward
    return count_products(contender.model, partial(contender.step, images, labels)).per(one)


def _ratio(key: str) -> Column[Row]:
    return Column(key, lambda row: "–" if row[key] is None else f"{row[key]:.2f}")


COLUMNS: Sequence[Column[Row]] = (
    Column("step", lambda row: f"{row['step']} × {row['updates']}".removesuffix(" × 1")),
    Column("same", lambda row: _percent(row["equal_pixels"])),
    Column("passes", lambda row: _products_text(row)),
    Column("ms", lambda row: f"{row['ms']:.1f}"),
    _ratio("ratio"),
    _ratio("limit"),
)
OF_MODEL: Sequence[Column[Row]] = (
    Column("model", lambda row: MODELS[row["model"]]),
    Column("dtype", lambda row: row["dtype"]),
)


def inner_table(rows: Sequence[Row]) -> Table:
    """The rows of one model in one dtype, for the terminal."""
    title = ", ".join(cells(OF_MODEL, rows[0]))
    table = terminal_table(headers(COLUMNS), title=title, no_wrap=True)
    for row in rows:
        table.add_row(*cells(COLUMNS, row))
    return table


def inner_markdown(rows: Sequence[Row]) -> str:
    """All rows, for docs/training.md."""
    return markdown_table((*OF_MODEL, *COLUMNS), rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _products_text(row: Row) -> str:
    """Each kind and their sum, such as "11+11+1=23"."""
    kinds = (f"{row['products'][kind]:.3g}" for kind in Products._fields)
    return f"{'+'.join(kinds)}={row['units']:.3g}"
