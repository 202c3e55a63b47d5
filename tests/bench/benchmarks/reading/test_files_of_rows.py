"""Every form in which rows lie on disk is read, and what is no file of rows is one clear line."""

import json
from pathlib import Path

import pytest
import torch
from row_files import MADE, cpu_row

from ironmoe.bench.benchmarks.gpus import GPUS, H100
from ironmoe.bench.benchmarks.kernels.operations import OPERATIONS, cases
from ironmoe.bench.benchmarks.reading.figures import TIME, measured
from ironmoe.bench.benchmarks.reading.files import RowsError, read_rows
from ironmoe.bench.benchmarks.reading.kinds import KINDS, kind_of
from ironmoe.bench.benchmarks.roofline_table import roofline_rows
from ironmoe.bench.benchmarks.scale.layers import LAYERS, World
from ironmoe.bench.benchmarks.scale.links import LINKS
from ironmoe.bench.benchmarks.scale.models import MODELS
from ironmoe.bench.benchmarks.scale.rows import cost_rows, memory_rows, mesh_rows, pays_rows
from ironmoe.bench.benchmarks.scale.times import Machine
from ironmoe.bench.benchmarks.shapes import SHAPES
from ironmoe.bench.reports.formats import written_rows

RESULTS = Path(__file__).parents[4] / "bench" / "results"
FILES = sorted(RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_file_of_results_is_read_or_refused_in_one_line(path):
    if path.name.startswith("study-"):
        with pytest.raises(RowsError, match="holds the numbers of ironmoe study") as refused:
            read_rows(path)
        assert "\n" not in str(refused.value)
        return
    file = read_rows(path)
    assert file.kinds
    for kind in file.kinds:
        for figure in kind.figures:
            assert any(figure.of(runs) is not None for runs in file.rows[kind.name].values())


def test_a_row_of_one_kind_is_of_no_other():
    for kind in KINDS:
        row = dict.fromkeys(kind.known_by)
        assert kind_of(row) is kind
        assert {kind.who, kind.series} <= set(kind.keys)


def test_rows_of_bench_cpu_are_one_for_each_implementation(rows_in):
    file = read_rows(rows_in("a.json", [cpu_row()]))
    (kind,) = file.kinds
    ours = ("8,4,4,2,1", "float32", "forward", "ironmoe")
    assert list(file.rows["bench cpu"]) == [ours, (*ours[:3], "dense")]
    assert kind.figures[0].of(file.rows["bench cpu"][ours]) == (10.0, 9.0, None)
    assert file.facts["processor"] == "AMD EPYC 9654" and file.facts["version of torch"] == "2.13.0"
    assert file.facts["setting runs"] == "9" and "version of ironmoe" not in file.facts


@pytest.mark.parametrize("form", ["csv", "json"])
def test_rows_in_a_format_are_read_as_the_file_is(tmp_path, rows_in, form):
    rows = [cpu_row(), cpu_row(dtype="bfloat16")]
    written = tmp_path / f"rows.{form}"
    written.write_text(written_rows(rows, form))
    one, other = read_rows(rows_in("a.json", rows)), read_rows(written)
    figure = one.kinds[0].figures[0]
    assert one.rows.keys() == other.rows.keys() and other.facts == {}
    for key, runs in one.rows["bench cpu"].items():
        assert figure.of(runs) == figure.of(other.rows["bench cpu"][key])


def come_back_whole(rows, tmp_path):
    """What is read of the rows, which is the same from CSV as from JSON."""
    files = []
    for form in ("json", "csv"):
        written = tmp_path / f"rows.{form}"
        written.write_text(written_rows(rows, form))
        files.append(read_rows(written))
    one, other = files
    assert one.kinds == other.kinds
    for kind in one.kinds:
        there, here = one.rows[kind.name], other.rows[kind.name]
        assert list(there) == list(here)
        for key, runs in there.items():
            assert len(runs) == len(here[key])
            assert all(figure.of(runs) == figure.of(here[key]) for figure in kind.figures)
    return one


def rows_of(path):
    """All rows of a file of results, as a command prints them."""
    content = json.loads(path.read_text())
    parts = [content] if "rows" in content else [e for part in content.values() for e in part]
    return [row for part in parts for row in part["rows"]]


MEASURED = [path for path in FILES if not path.name.startswith(("study-", "robust-loops"))]


@pytest.mark.parametrize("path", MEASURED, ids=[path.stem for path in MEASURED])
def test_measured_rows_come_back_whole_from_csv(tmp_path, path):
    file = come_back_whole(rows_of(path), tmp_path)
    assert sum(map(len, file.rows.values())) > 0


@pytest.mark.parametrize("parts", ["images-", "training-"])
def test_two_kinds_of_rows_in_one_csv_are_told_apart(tmp_path, parts):
    paths = [path for path in FILES if path.name.startswith(parts)]
    rows = [row for path in paths for row in rows_of(path)]
    assert len(come_back_whole(rows, tmp_path).kinds) == 2


def test_operations_without_a_variant_come_back_from_csv(tmp_path):
    shapes = SHAPES[:1]
    keys = [case.key for case in cases(tuple(OPERATIONS), shapes, torch.device("cpu"))]
    assert {key["operation"] for key in keys if not key["variant"]} >= {"combine", "plan_dispatch"}
    figures = {"ms": 2.0, "p25": 1.5, "p75": 2.5, "fastest": 1.0, "slowest": 3.0, "runs": 9}
    rows = [key | {"name": shapes[0].name} | figures for key in keys]
    file = come_back_whole(rows, tmp_path)
    assert len(file.rows["bench kernels"]) == len(keys)
    alone = [row for row in rows if row["operation"] == "combine"]
    assert len(come_back_whole(alone, tmp_path).rows["bench kernels"]) == len(alone)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_whatever_may_be_empty_in_a_row_may_be_empty_in_csv(tmp_path, kind):
    figures = {"milliseconds": {"ironmoe": 1.0}, "robust": {"value": 0.5, "total": 10}}
    figures |= {"clean": {"value": 0.5}, "pgd": {"value": 0.5}}
    row = {name: figures.get(name, 1.0) for name in sorted(kind.known_by)}
    whole = dict.fromkeys([*kind.keys, *(figure.name for figure in kind.figures)]) | row
    for empty in (None, ""):
        rows = [{name: empty if value is None else value for name, value in whole.items()}]
        assert come_back_whole(rows, tmp_path).kinds == [kind]


def test_inner_dicts_come_back_from_csv_at_every_depth(tmp_path):
    (tmp_path / "a.csv").write_text("operation,shape,dtype,ms,a.b.c,a.b.d,a.e\nx,1,y,2,3,,4\n")
    (runs,) = read_rows(tmp_path / "a.csv").rows["bench kernels"].values()
    assert runs[0]["a"] == {"b": {"c": 3}, "e": 4}


@pytest.mark.parametrize("every_kernel", [False, True])
def test_rows_of_the_roofline_come_back_from_csv(tmp_path, every_kernel):
    gpus = {gpu: gpu.peak for gpu in GPUS.values()}
    rows = roofline_rows(SHAPES[:2], gpus, every_kernel=every_kernel)
    file = come_back_whole(rows, tmp_path)
    assert sum(len(runs) for runs in file.rows["bench roofline"].values()) == len(rows)


def test_rows_of_scale_come_back_from_csv(tmp_path):
    machine = Machine(H100, H100.peak, LINKS["h100"])
    worlds = [World(1), World(8)]
    parts = {
        "cost": cost_rows(LAYERS, worlds, machine),
        "pays": pays_rows(LAYERS, worlds, machine),
        "mesh": mesh_rows(LAYERS, 8, worlds[0], machine),
        "memory": memory_rows(MODELS[:1], worlds, machine),
    }
    file = come_back_whole([row for rows in parts.values() for row in rows], tmp_path)
    for part, rows in parts.items():
        assert len(file.rows[f"bench scale, {part}"]) == len(rows)  # each has a name of its own


def test_rows_of_the_roofline_are_read(tmp_path):
    rows = roofline_rows(SHAPES[:1], {H100: H100.peak}, every_kernel=True)
    (tmp_path / "roof.json").write_text(written_rows(rows, "json"))
    file = read_rows(tmp_path / "roof.json")
    assert [kind.name for kind in file.kinds] == ["bench roofline"] and file.kinds[0].computed
    assert len(file.rows["bench roofline"]) == len({(r["pass"], r["kernel"]) for r in rows})


def test_times_of_pytest_benchmark_are_milliseconds_with_quartiles(tmp_path):
    stats = {"median": 0.002, "q1": 0.0019, "q3": 0.0023, "rounds": 9}
    content = {
        "machine_info": {"cpu": {"brand_raw": "Xeon"}, "python_version": "3.11"},
        "commit_info": {"id": "b" * 40, "dirty": True},
        "benchmarks": [{"group": "combine", "name": "test_combine[x]", "stats": stats}],
        "datetime": "2026-11-30T10:00:00",
        "version": "5.0",
    }
    (tmp_path / "kernels.json").write_text(json.dumps(content))
    file = read_rows(tmp_path / "kernels.json")
    (kind,) = file.kinds
    (runs,) = file.rows["pytest-benchmark"].values()
    assert kind.figures[0].of(runs) == pytest.approx((2.0, 1.9, 2.3))
    assert file.facts["processor"] == "Xeon" and file.facts["commit"].endswith("b-changed")


def test_rows_of_a_gpu_name_it(tmp_path):
    row = {
        "shape": "olmoe", "pass": "forward", "implementation": "ironmoe", "routing": "uniform",
        "dtype": "bfloat16", "ms": 5.0, "p20": 4.9, "p80": 5.2, "peak_bytes": 2e9, "runs": 20,
    }  # fmt: skip
    content = {"date": "2026-11-30 10:00", "device": {"name": "NVIDIA H100"}, "rows": [row]}
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    file = read_rows(tmp_path / "gpu.json")
    (kind,) = file.kinds
    (runs,) = file.rows["bench gpu"].values()
    assert [figure.of(runs) for figure in kind.figures] == [(5.0, 4.9, 5.2), (2000.0, None, None)]
    assert file.facts["GPU"] == "NVIDIA H100"


def test_rows_measured_several_times_are_runs_whose_median_counts(rows_in):
    file = read_rows(rows_in("a.json", [cpu_row(scale) for scale in (1.0, 1.5, 1.2)]))
    runs = file.rows["bench cpu"][("8,4,4,2,1", "float32", "forward", "ironmoe")]
    assert file.kinds[0].figures[0].of(runs) == (12.0, 10.0, 15.0) and file.repeated == 2


def test_one_run_says_nothing_of_noise(rows_in):
    file = read_rows(rows_in("a.json", [cpu_row(runs=1)]))
    runs = next(iter(file.rows["bench cpu"].values()))
    assert file.kinds[0].figures[0].of(runs) == (10.0, None, None)


@pytest.mark.parametrize(
    ("row", "low", "high"),
    [
        ({"p20": 9.0, "p80": 12.0}, 9.0, 12.0),
        ({"p25": 9.5, "p75": 11.0, "fastest": 1.0}, 9.5, 11.0),
        ({"times": [13.0, 8.0, 10.0]}, 8.0, 13.0),
        ({"fastest": 9.0}, 9.0, None),
        ({"fastest": 9.0, "runs": 1}, None, None),
        ({"times": [], "fastest": None}, None, None),
        ({}, None, None),
    ],
)
def test_the_range_of_a_figure_is_what_its_row_has(row, low, high):
    assert measured("ms", "ms", TIME).read({"ms": 10.0, **row}) == (10.0, low, high)


def test_a_folder_of_a_command_stands_for_its_rows(rows_in, tmp_path):
    rows_in("rows.json", [cpu_row()])
    assert read_rows(tmp_path).kinds


def test_all_occasions_of_a_file_are_named(tmp_path):
    parts = [
        {"made": MADE | {"machine": {"processor": name}}, "rows": [cpu_row(dtype=name)]}
        for name in ("one", "two")
    ]
    (tmp_path / "a.json").write_text(json.dumps({"measured": parts}))
    file = read_rows(tmp_path / "a.json")
    assert file.facts["processor"] == "one and two" and len(file.rows["bench cpu"]) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe\x00", "is no text"),
        (b"", "must be JSON"),
        (b"{}", "has no rows of ironmoe bench; it must be of bench cpu, bench attacks"),
        (b"[]", "has no rows"),
        (b"3", "has no rows"),
        (b'{"rows": []}', "has no rows"),
        (b'{"rows": [1, {"a": 2}]}', "has no rows"),
        (b'{"title": "", "settings": {}}', "is a report; ironmoe compare takes two runs"),
    ],
)
def test_what_has_no_rows_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RowsError, match=message) as refused:
        read_rows(path)
    assert "\n" not in str(refused.value) and str(path) in str(refused.value)


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(RowsError, match=r"a folder must hold rows\.json"):
        read_rows(tmp_path)


STRANGE = (None, True, 0, -1.5, "x", [], [1], {}, {"value": "x", "wilson_95": [1]}, [{"rows": 1}])


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_strange_values_are_no_figures_and_break_nothing(tmp_path, kind):
    path = tmp_path / "a.json"
    other = {"fastest", "p20", "p80", "times", "runs"}
    for value in STRANGE:
        row = dict.fromkeys(kind.known_by | other, value)
        path.write_text(json.dumps({"made": value, "settings": value, "rows": [row]}))
        try:
            file = read_rows(path)
        except RowsError:
            continue
        for found in file.kinds:
            for figure in found.figures:
                for runs in file.rows[found.name].values():
                    figure.of(runs)


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n", "a,a.b\n1,2\n", "a\n1,2,3\n", "shape,dtype\n\0,1\n", '"a\n1'],
)
def test_a_csv_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(RowsError, match=r"a\.csv") as refused:
        read_rows(tmp_path / "a.csv")
    assert "\n" not in str(refused.value)
