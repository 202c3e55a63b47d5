"""The tables of docs/scale.md on models that are larger than the device: of measured rows, and
computed.

Write them anew with ``python tests/support/offload_tables.py``.
"""

import json

from scale_tables import PAGE, markdown, number, with_tables

from ironmoe.bench.benchmarks.offload.modes import MODES, PLAIN
from ironmoe.bench.benchmarks.offload.run import PCIE_5
from ironmoe.bench.benchmarks.scale.models import MODELS, counted

ROWS = PAGE.parents[1] / "bench" / "results" / "offload-xeon-2cores-2026-11-30.json"
BF16 = 2


def measured():
    lines = []
    for row in json.loads(ROWS.read_text())["rows"]:
        cpu_ms = row["cpu_ms"]
        for mode in MODES:
            device = row["weights_mb"][mode] + row["peak_mb"][mode]
            sizes = (row["copied_mb"][mode], row["saved_mb"][mode], device)
            ratio = f"{cpu_ms[mode] / cpu_ms[PLAIN]:.2f}"
            lines.append((row["images"], mode, ratio, *(f"{size:.0f}" for size in sizes)))
    columns = ("images", "mode", "time", "MB copied", "MB saved", "MB on the device")
    return markdown(columns, lines)


def computed():
    lines = []
    for model in MODELS[:-1]:  # the last one is one layer
        found = counted(model)
        layer, copied = found.experts / found.layer.repeats, 2 * BF16 * found.experts
        there = BF16 * (found.rest + layer)
        sizes = (BF16 * found.total / 1e9, there / 1e9, copied / 1e9, copied / PCIE_5)
        lines.append((model.name, *map(number, sizes)))
    columns = ("model", "GB of weights", "GB of them on the device", "GB copied", "s a step")
    return markdown(columns, lines)


TABLES = {"offload": measured, "pcie": computed}


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), TABLES))
