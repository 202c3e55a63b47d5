"""``ironmoe bench scale``: its rows as tables, and what they rest on."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ironmoe.bench.benchmarks.scale.alternatives import MOST_TOKENS
from ironmoe.bench.benchmarks.scale.layers import World
from ironmoe.bench.benchmarks.scale.rows import COST, MEMORY, MESH, PAYS, Row
from ironmoe.bench.benchmarks.scale.times import Machine
from ironmoe.bench.benchmarks.shapes import SIZES, Shape
from ironmoe.bench.reports.tables import print_table

if TYPE_CHECKING:
    from rich.console import Console


def print_part(part: str, rows: Sequence[Row], machine: Machine, console: "Console") -> None:
    """Print the rows of one part."""
    print_table(TABLES[part](rows, machine), console)


def cost_table(rows: Sequence[Row], machine: Machine) -> Table:
    """What one layer costs: bytes that a rank sends, and milliseconds."""
    columns = ("MB sent", "off node", "exchange", "hidden", "experts", "moving", "layer", "ratio")
    table = _empty(
        f"What expert parallelism costs (computed): one bf16 layer ({SIZES}) on ranks of one "
        f"{machine.gpu.title}, ms",
        columns,
    )

    def figures(row: Row) -> tuple[str, ...]:
        return (
            _number(row["sent_mb"], 1),
            _number(row["off_node_mb"], 1),
            *(_number(row[f"{name}_ms"], 3) for name in ("exchange", "hidden")),
            _number(row["experts_ms"] + row["shared_ms"], 3),
            *(_number(row[f"{name}_ms"], 3) for name in ("moving", "layer")),
            f"{row['ratio']:.0%}",
        )

    _fill_by_layer(table, rows, figures)
    return table


def pays_table(rows: Sequence[Row], machine: Machine) -> Table:
    """Which way is the fastest, and up to which sizes expert parallelism is."""
    columns = ("EP", "FSDP2", "replicas", "fastest", "beats FSDP2", "beats replicas")
    table = _empty(
        f"When expert parallelism pays (computed): one bf16 layer ({SIZES}) on ranks of one "
        f"{machine.gpu.title}, ms",
        (*columns, "experts", "ranks"),
    )

    def figures(row: Row) -> tuple[str, ...]:
        return (
            *(_number(row[f"{name}_ms"], 3) for name in ("ep", "fsdp2", "replicas")),
            row["fastest"] or "none fits",
            *(_tokens(row[f"tokens_{name}"]) for name in ("fsdp2", "replicas")),
            *(_range(row[f"{name}_from"], row[f"{name}_to"]) for name in ("experts", "ranks")),
        )

    _fill_by_layer(table, rows, figures)
    return table


def mesh_table(rows: Sequence[Row], machine: Machine) -> Table:
    """The layouts of so many GPUs."""
    table = _empty(
        f"{rows[0]['gpus']} GPUs in groups (computed): one bf16 layer ({SIZES}) on "
        f"{machine.gpu.title}, ms",
        ("between groups", "ms", "GB", ""),
        first="layer, ranks of a group and pass",
    )

    def figures(row: Row) -> tuple[str, ...]:
        note = "fastest" if row["fastest"] else "" if row["fits"] else "does not fit"
        return row["between"], _number(row["layer_ms"], 3), _number(row["memory_gb"], 1), note

    _fill_by_layer(table, rows, figures)
    return table


def memory_table(rows: Sequence[Row], machine: Machine) -> Table:
    """What a rank holds."""
    names = {
        "attack_gb": "attack",
        "kept_gb": "kept",
        "recompute_gb": "recompute",
        "training_gb": "training",
        "kept_training_gb": "kept, training",
        "recompute_training_gb": "recompute, training",
    }
    table = _empty(
        f"Memory of a rank (computed), GB; one {machine.gpu.title} has {machine.links.memory:g}",
        tuple(names.values()),
        first="model and ranks",
    )
    model = None
    for row in rows:
        if row["model"] != model:
            model = row["model"]
            total = row["experts"] + row["rest"]
            table.add_row(f"[bold]{model}[/], {row['tokens']} tokens")
            table.add_row(f"  {total * 1e-9:.2f} B, {row['experts'] / total:.0%} in experts")
        table.add_row(f"  {row['ranks']}", *(_number(row[name], 2) for name in names))
    return table


TABLES: dict[str, Callable[[Sequence[Row], Machine], Table]] = {
    COST: cost_table,
    PAYS: pays_table,
    MESH: mesh_table,
    MEMORY: memory_table,
}


def words_of(part: str) -> str:
    """What the columns of a part mean."""
    if part == COST:
        return (
            "MB sent: to other ranks, by the mean rank. exchange: all-to-alls of the pass and of "
            "counts. hidden: what shared experts hide of it. experts: routed and shared ones. "
            "moving: rows put in order for the exchange. ratio: the exchange that is not hidden, "
            "divided by the experts."
        )
    if part == PAYS:
        return (
            "fastest: of the ways whose memory suffices for the experts of the whole model. beats "
            "FSDP2, beats replicas: EP is the faster one up to so many tokens a rank, whatever the "
            f"memory; always: at {MOST_TOKENS} tokens, too. experts: the smallest and the largest "
            "number E with which EP is the fastest that fits on these ranks. ranks: the smallest "
            "and the largest number of ranks on which it is with the layer's own E."
        )
    if part == MESH:
        return (
            "ranks of a group: over which the experts are spread; 1 is without expert parallelism. "
            "replicas: each group has all experts, and gradients are averaged after the backward "
            "pass. FSDP2: the groups share each weight. GB: the experts of the whole model and "
            "what their layers keep. fastest: of those that fit."
        )
    return (
        "attack: frozen bfloat16 weights, the share of the experts and all others. training: "
        "float32 weights, gradients and AdamW's states, experts shared out by EP and all others by "
        "FSDP2. kept: by the MoE layers for the backward pass, on top; recompute: the same with "
        "recompute=True."
    )


def origins_of(world: World, machine: Machine) -> str:
    """The numbers that everything rests on, and where they come from."""
    links, rates = machine.links, machine.rates
    load = "all ranks get as many rows"
    if world.imbalance > 1:
        load = f"the busiest rank gets {world.imbalance:g} times the mean"
    return (
        f"Computed, not measured, for {world.node} ranks a node; {load}. {machine.gpu.title}: "
        f"{rates.tflops:g} TFLOP/s, {rates.terabytes:g} TB/s; to GPUs of its node "
        f"{links.nvlink:g} GB/s, to other nodes {links.network:g} GB/s ({links.source}). Latency "
        f"of an exchange: {links.start_us:g} µs, and {links.nvlink_us:g} or {links.network_us:g} "
        "a step (NCCL, src/graph/tuning.cc)."
    )


def _empty(title: str, columns: Sequence[str], first: str = "layer, ranks and pass") -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _fill_by_layer(
    table: Table, rows: Sequence[Row], figures: Callable[[Row], tuple[str, ...]]
) -> None:
    """Add a line for each row, and one above the first row of each layer."""
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            table.add_row(f"[bold]{Shape(shape, *row['sizes']).title}[/]")
        table.add_row(f"  {row['ranks']} {row['pass']}", *figures(row))


def _number(value: float, decimals: int) -> str:
    return "0" if not value else f"{value:.{decimals}f}" if value < 1000 else f"{value:.0f}"


def _tokens(tokens: int | None) -> str:
    return "always" if tokens is None else "never" if tokens == 0 else f"{tokens}"


def _range(least: int | None, most: int | None) -> str:
    return "none" if least is None else f"{least}" if least == most else f"{least} to {most}"
