"""The help of every command, as a user of a narrow terminal reads and pastes it."""

import re
import shlex

import pytest
import typer
from typer.testing import CliRunner

from ironmoe.bench.cli.app import app
from ironmoe.bench.cli.help.panels import PANELS

PROGRAM = typer.main.get_command(app)
MANY = 10


def commands(group=PROGRAM, path=()):
    """(words of the command, the command) of the program and all below it."""
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


COMMANDS = dict(commands())
LEAVES = [path for path, command in COMMANDS.items() if not hasattr(command, "commands")]


@pytest.fixture(scope="module")
def help_of():
    kept = {}

    def printed(path, width=80):
        if (path, width) not in kept:
            result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(width)})
            assert result.exit_code == 0, result.output
            kept[path, width] = result.output
        return kept[path, width]

    return printed


def examples(text):
    """The commands in a help, each with its continued lines."""
    joined = text.replace("\\\n", " ")
    return re.findall(r"^  ((?:ironmoe|torchrun) .*)$", joined, re.M)


def in_one_line(text):
    return " ".join(text.replace("**", "").replace("`", "").split())


@pytest.mark.parametrize("width", [60, 80, 100, 300])
@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_the_terminal_and_cuts_nothing(path, width, help_of):
    """Examples keep their lines, which fit 80 columns."""
    text = help_of(path, width)
    assert max(map(len, text.splitlines())) <= min(max(width, 80), 100)
    filled = re.sub(r"^  (ironmoe|torchrun) (.*\\\n)*.*$", "", text, flags=re.M)
    assert max(map(len, filled.splitlines())) <= min(width, 100)
    assert "{" not in text
    whole = in_one_line(text)
    for param in COMMANDS[path].params:
        for part in re.split(r"\{\w+\}", param.help or ""):
            assert in_one_line(part) in whole, part


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_each_example_is_a_command_that_is_understood(path, help_of):
    lines = examples(help_of(path))
    assert lines, "the docstring needs an indented paragraph that begins with ironmoe"
    assert not re.search(r"Examples?: \w", help_of(path))
    for line in lines:
        words = shlex.split(line.partition(" > ")[0])
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        assert tuple(words[1 : len(path) + 1]) == path
        # raises where an option is not known or its value not allowed
        COMMANDS[path].make_context(path[-1], words[len(path) + 1 :])


def test_an_example_with_a_wrong_option_is_found():
    with pytest.raises(Exception, match="--radius"):
        COMMANDS["attack",].make_context("attack", ["--radius", "8"])


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_many_options_stand_in_groups(path):
    names = {param.name for param in COMMANDS[path].params}
    panels = PANELS.get(" ".join(path), {})
    placed = " ".join(panels.values()).split()
    assert len(placed) == len(set(placed))
    if len(names) > MANY or panels:
        assert names - set(placed) == set(), f"give them a place in PANELS[{' '.join(path)!r}]"


def test_the_options_of_attack_come_in_the_order_in_which_one_thinks(help_of):
    text = help_of(("attack",))
    titles = ["Model:", "Data:", "Attack:", "Verdict:", "Device and time:", "Output:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)
    assert text.index("--all") < text.index("  --eps") < text.index("--passes")


def test_a_long_form_of_a_model_is_whole_at_80_columns(help_of):
    text = help_of(("attack",))
    assert "torchvision:NAME?weights=DEFAULT" in text and "vmoe:PREFIX" in text


def test_an_option_says_which_attacks_it_touches(help_of):
    text = in_one_line(help_of(("attack",)))
    alpha = text.partition("--alpha TEXT")[2].partition("--restarts")[0]
    assert "for pgd, mifgsm" in alpha and "unit of --eps" in alpha
    steps = text.partition("--steps N")[2].partition("--alpha")[0]
    assert "pgd" in steps and "square" not in steps  # --queries is for it


def test_defaults_are_shown_as_they_are_typed(help_of):
    text = help_of(("attack",))
    assert "[default: --checks]" in text and "[default: Linf]" in text
    assert "[default: None]" not in text and "[default: False]" not in text


def test_bold_names_are_for_terminals_alone(help_of):
    assert "\x1b" not in help_of(("attack",))
    shown = CliRunner().invoke(app, ["compare", "--help"], color=True).output
    assert "\x1b[1m--json\x1b[0m" in shown


@pytest.mark.parametrize("path", [(), ("bench",)], ids=" ".join)
def test_a_command_that_needs_another_word_shows_its_help(path):
    result = CliRunner().invoke(app, path)
    assert "Commands:" in result.output
    assert result.exit_code in (0, 2)  # click's changed in 8.2


def test_a_wrong_option_is_told_in_lines_that_are_not_cut():
    result = CliRunner().invoke(app, ["attack", "--steps", "-1"], env={"COLUMNS": "40"})
    assert result.exit_code == 2
    assert "Invalid value for '--steps': must be at least 1, got -1" in result.output
