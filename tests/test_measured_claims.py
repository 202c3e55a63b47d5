"""Ranges that README and docs/measurements.md claim are those of the rows in bench/results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGE = ((1576, 384, 1536, 32, 2), (1024, 768, 3072, 8, 2))
ZEN4, XEON = "cpu-epyc-zen4-2cores-2026-11-22", "cpu-xeon-2cores-2026-11-30"


def times_as_fast(file, dtype, *, large):
    """The smallest and largest time of Hugging Face's better one over that of ironmoe."""
    rows = json.loads((ROOT / "bench" / "results" / f"{file}.json").read_text())
    rows = rows["rows"] if isinstance(rows, dict) else rows
    ratios = [
        min(row["milliseconds"][name] for name in ("eager", "grouped_mm"))
        / row["milliseconds"]["ironmoe"]
        for row in rows
        if row["dtype"] == dtype and (tuple(row["shape"]) in LARGE) == large
    ]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


@pytest.mark.parametrize(
    ("page", "file", "dtype", "large"),
    [
        ("README.md", ZEN4, "float32", True),
        ("README.md", ZEN4, "bfloat16", True),
        ("README.md", XEON, "float32", True),
        ("README.md", XEON, "bfloat16", True),
        ("docs/measurements.md", ZEN4, "float32", True),
        ("docs/measurements.md", XEON, "float32", True),
        ("docs/measurements.md", XEON, "bfloat16", True),
        ("docs/measurements.md", XEON, "float32", False),
        ("docs/measurements.md", XEON, "bfloat16", False),
    ],
)
def test_the_range_of_a_layer_is_that_of_its_rows(page, file, dtype, large):
    words = " ".join((ROOT / page).read_text().split())
    assert f"{times_as_fast(file, dtype, large=large)} times" in words


def test_the_range_of_autoattack_is_that_of_its_rows():
    rows = [
        row
        for path in (ROOT / "bench" / "results").glob("attacks-autoattack-*.json")
        for row in json.loads(path.read_text())["rows"]
        if row.get("library") == "official"
    ]
    shares = [1 / row["ratio"] for row in rows]
    words = " ".join((ROOT / "README.md").read_text().split())
    assert "between a twelfth and two thirds of the time of the official code" in words
    assert min(shares) >= 1 / 12.5 and max(shares) <= 0.67
    assert all(row["agreement"] == 1 for row in rows)
