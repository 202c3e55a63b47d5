"""Every table of every command shows its numbers whole, in narrow terminals and in pipes."""

import ast
import io
import re
from collections import Counter
from pathlib import Path

import pytest
from demo_results import model_results
from rich.console import Console

import ironmoe.bench.cli
from ironmoe.attacks import ComparedAccuracy
from ironmoe.attacks.evaluation.proportion import Proportion
from ironmoe.attacks.results.paired import paired_difference
from ironmoe.bench.attack.rows import COST_COLUMNS, RESULT_COLUMNS, Cost, RobustnessRow
from ironmoe.bench.compare import compare
from ironmoe.bench.demo.table import as_table, routing_table
from ironmoe.bench.doctor.doctor import _versions_table
from ironmoe.bench.reports.tables import cells, headers, print_table, terminal_table

BENCH = Path(ironmoe.bench.cli.__file__).parents[1]
LINES = "│┃┏┓┗┛┡┩├┤┼┴┬─━┳╇└┘"


def filled(columns, items):
    table = terminal_table(headers(columns), title="Some 12345 numbers of a long title")
    for item in items:
        table.add_row(*cells(columns, item))
    return table


def of_attack():
    share = Proportion(8100, 10_000)
    return filled(
        RESULT_COLUMNS,
        [
            RobustnessRow("autoattack-standard", 0.123456, share, 1234, 8100),
            RobustnessRow("", 8.0, share, 1234, 0),
        ],
    )


def of_costs():
    return filled(COST_COLUMNS, [Cost("autoattack-standard", 12345, 12345, 0.123, 10**9, 10**10)])


def of_comparison():
    values = [float(number % 3 > 0) for number in range(100)]
    result = paired_difference(values, values[::-1])
    line = ComparedAccuracy("autoattack-standard", 8 / 255, 81, result, 81, 13)
    return filled((*compare.COLUMNS, compare.UNDECIDED), [line, line])


def of_demo():
    learned = {"clean": [97, 95], "robust": [[90, 50, 3], [88, 47, 1]]}
    models = [model_results("V-MoE", **learned), model_results("ViT", **learned)]
    return as_table(models, "V-MoE and ViT\nunder attack")


def of_routing():
    learned = {"clean": [97], "robust": [[90, 50, 3]]}
    layers = tuple(f"blocks.{number}.mlp" for number in range(8))
    return routing_table([model_results("V-MoE", **learned, layers=layers)])


def of_training():
    table = terminal_table(["", ""], title="V-MoE trained on digits")
    table.show_header = False
    table.add_row("clean accuracy of the chosen epoch", "97.1 % [95.0, 98.6], epoch 12 of 100")
    table.add_row("checkpoint", "runs/train-v-moe-1a2b3c4d/checkpoints/a-long-name.safetensors")
    return table


TABLES = (of_attack, of_costs, of_comparison, of_demo, of_routing, of_training, _versions_table)


def printed(table, width, is_terminal):
    file = io.StringIO()
    print_table(table, Console(file=file, width=width, force_terminal=is_terminal, no_color=True))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("make", TABLES)
@pytest.mark.parametrize(("width", "is_terminal"), [(60, True), (80, True), (60, False)])
def test_no_number_and_no_word_is_cut(make, width, is_terminal):
    table = make()
    asked = Counter()
    for column in table.columns:
        asked += Counter(" ".join(map(str, column.cells)).split())
    text = printed(table, width, is_terminal)

    seen = Counter(text.translate(dict.fromkeys(map(ord, LINES), " ")).split())
    assert asked - seen == Counter() and "…" not in text
    if is_terminal:
        long = max(map(len, asked)) + 4  # of what has no spaces nothing is broken
        assert max(map(len, text.splitlines())) <= max(width, long)


def test_a_pipe_has_no_width_and_a_terminal_that_is_too_narrow_gets_blocks():
    piped = printed(of_routing(), 60, False).splitlines()
    assert len({len(line) for line in piped[1:]}) == 1 and len(piped[1]) > 200
    blocks = printed(of_routing(), 60, True).splitlines()
    assert "eps/255: clean" in blocks and any(
        re.fullmatch(r"  blocks\.7: busiest expert: [\d.]+ × even", line) for line in blocks
    )


def test_a_name_stands_in_each_block_of_its_rows():
    table = terminal_table(["attack", "eps", "accuracy that is long " + "x" * 60])
    table.add_row("pgd", "1", "10 %")
    table.add_row("", "2", "5 %")
    assert printed(table, 60, True).count("attack: pgd") == 2


def test_no_table_of_a_command_is_printed_otherwise():
    """``Console.print`` cuts what is too wide."""
    makers = re.compile(r"table(?!s?\.py)|routing$", re.IGNORECASE)
    found = []
    for file in BENCH.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_print and node.func.attr == "print" and node.args:
                what = ast.unparse(node.args[0])
                if isinstance(node.args[0], ast.Name | ast.Call) and makers.search(what):
                    found.append(f"{file.relative_to(BENCH)}: {what}")
    assert found == ["reports/tables.py: table"]
