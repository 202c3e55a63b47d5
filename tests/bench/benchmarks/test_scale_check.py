"""The bytes of the cost model are those that layers hand to torch.distributed, in 2 and in 4
processes. All cases run in one command, because imports take longer than the layers."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
from fork_server import run_forked
from typer.testing import CliRunner

from ironmoe.bench.benchmarks.passes import DX, FULL, INFERENCE
from ironmoe.bench.benchmarks.scale import check, forked, gloo, throughput
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.user_error import UserError

COMMAND = ["bench", "scale", "--check"]
COUNT = """
import json
from ironmoe.bench.benchmarks.scale import gloo

print(json.dumps(gloo._rows_of_worlds()))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """As the command gets them, from a process that need not import torch."""
    return printed(COUNT, tmp_path_factory.mktemp("check"))


def printed(program, folder, *arguments):
    """What a program prints as JSON."""
    (folder / "program.py").write_text(program)
    run_forked(folder / "program.py", folder, *arguments)
    return json.loads((folder / "output.txt").read_text().splitlines()[-1])


def test_counted_bytes_are_equal_to_computed_ones(rows):
    cases = {(row["ranks"], row["case"], row["pass"], row["rank"]) for row in rows}
    assert len(cases) == len(rows) == (2 + 4) * len(gloo.CASES) * 3
    for row in rows:
        for name in ("rows", "counts", "sums", "exchanges"):
            assert row[name]["counted"] == row[name]["computed"], row
    assert all(row["equal"] for row in rows)


def test_the_counted_bytes_are_of_many_kinds(rows):
    """Else an equality would say little."""
    counted = {(row["ranks"], row["case"], row["pass"], row["rank"]): row["rows"] for row in rows}
    alone = {key: number["counted"] for key, number in counted.items()}
    assert len({value for (_, _, name, _), value in alone.items() if name == INFERENCE}) > 10
    for (ranks, case, name, rank), value in alone.items():
        if name == DX:
            assert (
                value == alone[ranks, case, FULL, rank] == 2 * alone[ranks, case, INFERENCE, rank]
            )
    # a rank without tokens sends what its experts give, and nothing else
    assert alone[2, "no token on rank 0", INFERENCE, 0] > 0


def test_the_command_prints_them_and_fails_where_one_differs(rows, monkeypatch):
    monkeypatch.setattr(check, "counted_rows", lambda: rows)
    result = CliRunner().invoke(app, COMMAND, env={"COLUMNS": "120"})
    assert result.exit_code == 0 and f"all {len(rows)} rows" in " ".join(result.output.split())
    assert json.loads(CliRunner().invoke(app, [*COMMAND, "--format", "json"]).stdout) == rows

    wrong = deepcopy(rows)
    wrong[3]["rows"]["counted"] += 1
    wrong[3]["equal"] = False
    monkeypatch.setattr(check, "counted_rows", lambda: wrong)
    result = CliRunner().invoke(app, COMMAND, env={"COLUMNS": "120"})
    assert result.exit_code == 1 and f"1 of {len(rows)} rows differ" in result.output


def test_a_process_that_fails_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(forked.sys, "executable", "false")
    with pytest.raises(UserError, match="--check: a process failed: code 1"):
        gloo.counted_rows()


# a small layer, and few rounds
MEASURE = """
import json
from ironmoe.bench.benchmarks.scale import throughput
from ironmoe.bench.benchmarks.scale.forked import on_each_rank

throughput.TOKENS, throughput.DIM, throughput.HIDDEN, throughput.ROUNDS = 8, 16, 24, 3
print(json.dumps(on_each_rank(throughput._of_argument, 2)))
"""


def test_throughput_is_measured_kept_and_printed(tmp_path, monkeypatch):
    first, _ = printed(MEASURE, tmp_path, DX)
    assert 0 <= first["largest_error"] < 1e-5 and first["rounds"] == 3
    for way in throughput.WAYS:
        assert 0 < first["fastest"][way] <= first["milliseconds"][way]
        rate = 8 / first["milliseconds"][way] * 1e3
        assert first["tokens_per_second"][way] == pytest.approx(rate)
    assert throughput._is_whole(first)

    asked = []
    row = first | {"ratio": [1.25, 1.5, 1.75], "largest_error": 2e-7}
    row["tokens_per_second"] = dict(zip(throughput.WAYS, (1000.0, 2000.0, 3000.0), strict=True))
    monkeypatch.setattr(throughput, "in_fresh_process", lambda *args: asked.append(args[-1]) or row)
    file = tmp_path / "rows.json"
    command = ["bench", "scale", "--throughput", "--out", str(file)]
    output = " ".join(CliRunner().invoke(app, command, env={"COLUMNS": "120"}).output.split())
    assert "1,000 │ 2,000 │ 3,000 │ 1.50 (1.25 to 1.75)" in output
    assert "differ from those of one by 2e-07 at most" in output
    assert [row["pass"] for row in json.loads(file.read_text())["rows"]] == [INFERENCE, DX, FULL]

    # what is there is not measured again
    found = json.loads(CliRunner().invoke(app, [*command, "--format", "json"]).stdout)
    assert [row["ratio"][1] for row in found] == [1.5] * 3 and asked == [INFERENCE, DX, FULL]
    CliRunner().invoke(app, [*command, "--again"])
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--throughput", "--ranks", "2"], "--throughput has layers of its own, got --ranks"),
        (["--check", "--ranks-a-node", "2"], "--check has layers of its own, got --ranks-a-node"),
        (["--check", "--throughput"], "got --throughput, too"),
        (["--out", "rows.json"], "only the rows of --throughput are kept, got --out, too"),
    ],
)
def test_options_that_would_have_no_use_are_errors(options, words):
    result = CliRunner().invoke(app, ["bench", "scale", *options], env={"COLUMNS": "120"})
    assert result.exit_code and words in " ".join(result.output.split())


def test_the_measured_rates_of_the_documents_are_those_of_the_rows():
    root = Path(__file__).parents[3]
    page = (root / "docs" / "scale.md").read_text()
    (name,) = set(re.findall(r"results/(scale-throughput-[\w-]+\.json)", page))
    rows = json.loads((root / "bench" / "results" / name).read_text())["rows"]
    assert [row["pass"] for row in rows] == [INFERENCE, DX, FULL]
    for row in rows:
        cells = throughput.rates_and_ratio(row)
        assert f"| {row['pass']} | {' | '.join(cells)} |\n" in page
