"""The tables in docs/scale.md, computed by the cost model.

Write them anew with ``python tests/support/scale_tables.py``.
"""

import re
from functools import partial
from pathlib import Path

from ironmoe.bench.benchmarks.gpus import GPUS
from ironmoe.bench.benchmarks.passes import DX, FULL
from ironmoe.bench.benchmarks.scale.alternatives import (
    experts_where_fastest,
    ranks_until,
    ranks_where_fastest,
)
from ironmoe.bench.benchmarks.scale.layers import DEEPSEEK, LAYERS, World
from ironmoe.bench.benchmarks.scale.links import LINKS
from ironmoe.bench.benchmarks.scale.models import MODELS
from ironmoe.bench.benchmarks.scale.rows import cost_rows, memory_rows, mesh_rows, pays_rows
from ironmoe.bench.benchmarks.scale.times import Machine
from ironmoe.bench.benchmarks.scale.ways import FSDP2, REPLICAS

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
H100 = GPUS["h100"]
MACHINE = Machine(H100, H100.reached, LINKS["h100"])
SHOWN = (DX, FULL)
RANKS = (1, 2, 8, 32, 64)
USES = (
    ("attack", "attack_gb", "kept_gb"),
    ("training", "training_gb", "kept_training_gb"),
)


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def worlds(*ranks):
    return [World(number) for number in ranks]


def number(value):
    """Three digits, or all of a whole number."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def links():
    columns = ("GPU", "GB/s inside a node", "GB/s to other nodes", "GB of memory", "source")
    return markdown(
        columns,
        [
            (f"`{name}`", f"{of.nvlink:g}", f"{of.network:g}", f"{of.memory:g}", of.source)
            for name, of in LINKS.items()
        ],
    )


def cost():
    columns = ("layer", "ranks", "pass", "MB sent", "off the node", "exchange, ms", "experts, ms")
    return markdown(
        (*columns, "ratio"),
        [
            (
                f"`{row['shape']}`",
                row["ranks"],
                row["pass"],
                number(row["sent_mb"]),
                number(row["off_node_mb"]),
                number(row["exchange_ms"]),
                number(row["experts_ms"] + row["shared_ms"]),
                f"{row['ratio']:.0%}",
            )
            for row in cost_rows(LAYERS, worlds(8, 16), MACHINE)
            if row["pass"] in SHOWN
        ],
    )


def pays():
    def until(tokens):
        return "always" if tokens is None else tokens or "never"

    columns = ("layer", "ranks", "pass", "EP", "FSDP2", "replicas")
    return markdown(
        (*columns, "tokens, faster than FSDP2", "tokens, faster than replicas"),
        [
            (
                f"`{row['shape']}`, {row['sizes'][0]} tokens",
                row["ranks"],
                row["pass"],
                *(number(row[f"{way}_ms"]) for way in ("ep", "fsdp2", "replicas")),
                *(until(row[f"tokens_{way}"]) for way in ("fsdp2", "replicas")),
            )
            for row in pays_rows(LAYERS, worlds(8, 32), MACHINE)
            if row["pass"] in SHOWN
        ],
    )


def largest():
    """How many experts and how many ranks there may be."""
    columns = ("layer", "pass", "experts, on 8 ranks", "experts, on 64 ranks", "ranks, fastest")
    lines = []
    for layer in LAYERS:
        for pass_name in SHOWN:
            experts = [
                experts_where_fastest(layer, world, pass_name, MACHINE) for world in worlds(8, 64)
            ]
            case = layer, World(1), pass_name, MACHINE
            ranks = ranks_where_fastest(*case)
            most = [ranks_until(other, *case) or "never" for other in (FSDP2, REPLICAS)]
            lines.append((f"`{layer.shape.name}`", pass_name, *map(span, [*experts, ranks]), *most))
    return markdown((*columns, "ranks, faster than FSDP2", "ranks, faster than replicas"), lines)


def span(ends):
    """The smallest and the largest number."""
    if ends is None:
        return "none"
    return str(ends[0]) if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def memory():
    """Weights and what belongs to them by ranks, and what the MoE layers keep."""
    ranks = ("1 rank", *(f"{number} ranks" for number in RANKS[1:]))
    columns = ("model", "parameters", "for", *ranks, "kept by 1", "kept by each of several")
    rows = memory_rows(MODELS, worlds(*RANKS), MACHINE)
    found = {(row["model"], row["ranks"]): row for row in rows}
    lines = []
    for model in MODELS:
        first, second = found[model.name, 1], found[model.name, 2]
        parameters = (first["experts"] + first["rest"]) * 1e-9
        for use, name, kept in USES:
            of_ranks = [found.get((model.name, ranks)) for ranks in RANKS]
            sizes = ["–" if row is None else number(row[name]) for row in of_ranks]
            last = number(first[kept]), number(second[kept])
            lines.append((model.name, f"{parameters:.2f} B", use, *sizes, *last))
    return markdown(columns, lines)


def recipe(gpus):
    """The fastest layout of so many GPUs that fits, for each layer and pass."""
    lines = []
    for layer in (*LAYERS, DEEPSEEK._replace(repeats=1)):
        rows = mesh_rows([layer], gpus, World(1), MACHINE)
        layers = f"{layer.repeats} layers" if layer.repeats > 1 else "1 layer"
        for pass_name in SHOWN:
            of_pass = [row for row in rows if row["pass"] == pass_name]
            best = next((row for row in of_pass if row["fastest"]), None)
            words = ("none fits", "", "") if best is None else layout(best)
            lines.append((f"`{layer.shape.name}`, {layers}", pass_name, *words))
    return markdown(("model", "pass", "layout", "ms a layer", "GB a GPU"), lines)


def layout(row):
    """The mesh, by the names of its dimensions."""
    groups = row["gpus"] // row["ranks"]
    between = "dp" if row["between"] == REPLICAS else "fsdp"
    sizes = {between: groups, "ep": row["ranks"]}
    words = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return words or "no mesh", number(row["layer_ms"]), number(row["memory_gb"])


TABLES = {
    "links": links,
    "cost": cost,
    "pays": pays,
    "largest": largest,
    "memory": memory,
    "recipe-1": partial(recipe, 1),
    "recipe-8": partial(recipe, 8),
    "recipe-64": partial(recipe, 64),
}


def with_tables(page, tables=TABLES):
    """The text of the page with the tables of today."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        page = re.sub(f"(?<={begin}).*(?={end})", lambda _, t=table: t(), page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
