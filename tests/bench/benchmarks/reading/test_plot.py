"""Pictures of rows: a bar for each, and nothing on top of anything else."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from row_files import cpu_row

pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt

from ironmoe.bench.benchmarks.reading import plot
from ironmoe.bench.benchmarks.reading.files import RowsError
from ironmoe.bench.benchmarks.reading.plot import (
    checked_picture,
    draw_files,
    without_a_common_row,
)

RESULTS = Path(__file__).parents[4] / "bench" / "results"
ONE_OF_EACH = (
    "cpu-epyc-zen4*",
    "attacks-pgd-xeon*",
    "attacks-autoattack-xeon*",
    "attacks-bf16-epyc-1core*",
    "images-attack*",
    "images-loading*",
    "training-inner-epyc*",
    "training-methods*",
    "robust-loops*",
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def all_axes(picture):
    return [axes for part in picture.subfigs for axes in part.axes]


@pytest.mark.parametrize("pattern", ONE_OF_EACH)
def test_no_label_is_on_another_and_every_bar_is_inside(pattern):
    (path,) = RESULTS.glob(f"{pattern}.json")
    picture = draw_files([path])
    picture.canvas.draw()
    (axes,) = all_axes(picture)
    ticks = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(one.y0 >= other.y1 - 1 for one, other in pairwise(ticks))
    across = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
    assert all(one.x1 <= other.x0 for one, other in pairwise(across))

    inside = axes.get_window_extent()
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert bool(axes.patches) != bool(points), "bars, or points on a logarithmic scale"
    bars = [mark.get_window_extent() for mark in [*axes.patches, *points]]
    assert bars and all(inside.y0 <= bar.y0 and bar.y1 <= inside.y1 for bar in bars)
    assert all(text.get_window_extent().x1 <= picture.bbox.x1 for text in axes.texts)
    titles = [axes.title, picture.subfigs[0]._suptitle]
    boxes = [title.get_window_extent() for title in titles]
    assert boxes[0].y1 <= boxes[1].y0 and boxes[0].x1 <= picture.bbox.x1


def test_bars_are_as_long_as_their_figures_in_every_file(rows_in):
    a = rows_in("a.json", [cpu_row(), cpu_row(dtype="bfloat16")])
    b = rows_in("b.json", [cpu_row(2.0)])
    one, other = all_axes(draw_files([a, b]))
    assert sorted(bar.get_width() for bar in one.patches) == [8.0, 8.0, 10.0, 10.0]
    assert sorted(bar.get_width() for bar in other.patches) == [8.0, 20.0]
    assert one.get_xlim() == other.get_xlim() and one.get_ylim() == other.get_ylim()
    ours = {bar.get_y() for axes in (one, other) for bar in axes.patches}
    assert len(ours) == 4, "a row has its place in both pictures"


def test_bars_that_could_not_be_seen_get_a_logarithmic_scale(rows_in):
    (axes,) = all_axes(draw_files([rows_in("a.json", [cpu_row(100.0)])]))
    assert axes.get_xscale() == "log" and "logarithmic scale" in axes.get_xlabel()
    assert not axes.patches, "the length of a bar would say nothing there"
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert sorted(line.get_xdata()[0] for line in points) == [8.0, 1000.0]
    (axes,) = all_axes(draw_files([rows_in("b.json", [cpu_row(2.0)])]))
    assert "logarithmic" not in axes.get_xlabel()
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0


def test_a_line_goes_as_far_as_runs_were_measured(rows_in, tmp_path):
    (axes,) = all_axes(draw_files([rows_in("a.json", [cpu_row()])]))
    lines = sorted(tuple(line.get_xdata()) for line in axes.lines)
    assert lines == [(7.2, 8.0), (9.0, 10.0)], "the fastest run alone is known"
    row = {
        "operation": "combine", "variant": "", "shape": [8, 4, 4, 2, 1], "dtype": "float32",
        "ms": 2.0, "p25": 1.5, "p75": 2.75, "runs": 9,
    }  # fmt: skip
    (tmp_path / "b.json").write_text(json.dumps([row]))
    (axes,) = all_axes(draw_files([tmp_path / "b.json"]))
    assert [tuple(line.get_xdata()) for line in axes.lines] == [(1.5, 2.75)]


def test_files_without_a_common_row_are_named_so(rows_in):
    a, b = rows_in("a.json", [cpu_row()]), rows_in("b.json", [cpu_row(2.0)])
    other = rows_in("c.json", [cpu_row(shape=(9, 9, 9, 3, 1))])
    assert without_a_common_row([a, b]) == without_a_common_row([a]) == ""
    assert without_a_common_row([a, other, b]) == ""
    assert "No row is in two of these files" in without_a_common_row([a, other])

    cli = pytest.importorskip("ironmoe.bench.cli.app")
    runner = pytest.importorskip("typer.testing").CliRunner()
    out = str(a.parent / "rows.png")
    result = runner.invoke(cli.app, ["bench", "plot", str(a), str(other), "--out", out])
    assert result.exit_code == 0 and result.stderr.count("\n") == 1
    assert "No row is in two" in result.stderr and "No row" not in result.stdout


def test_what_cannot_be_drawn_is_refused_in_one_line(rows_in, tmp_path, monkeypatch):
    a = rows_in("a.json", [cpu_row()])
    with pytest.raises(RowsError, match="--figure must be ms, got 'seconds'"):
        draw_files([a], "seconds")
    (attacks,) = RESULTS.glob("attacks-pgd-xeon*.json")
    with pytest.raises(RowsError, match="both files must be of one benchmark"):
        draw_files([a, attacks])
    with pytest.raises(RowsError, match=r"--out must end in \.png, \.svg, \.pdf, got rows\.jpg"):
        checked_picture(Path("rows.jpg"))
    with pytest.raises(RowsError, match="in a folder that exists"):
        checked_picture(tmp_path / "none" / "rows.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(RowsError, match="got the folder"):
        checked_picture(tmp_path / "x.png")
    monkeypatch.setattr(plot, "MOST_BARS", 1)
    with pytest.raises(RowsError, match=r"from 1 to 1 bars of ms, these files have 2; .*--only"):
        draw_files([a])
    assert draw_files([a], only=["dense"])


@pytest.mark.parametrize("ending", ["png", "svg", "PDF"])
def test_the_command_writes_the_picture(rows_in, tmp_path, ending):
    cli = pytest.importorskip("ironmoe.bench.cli.app")
    runner = pytest.importorskip("typer.testing").CliRunner()
    out = tmp_path / f"rows.{ending}"
    a, b = rows_in("a.json", [cpu_row()]), rows_in("b.json", [cpu_row(2.0)])
    result = runner.invoke(cli.app, ["bench", "plot", str(a), str(b), "--out", str(out)])
    assert result.exit_code == 0, result.output
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}
    assert out.read_bytes().startswith(begins[ending])
