"""The commands in the documentation: they exist and have the options that stand there."""

import re
import shlex

import pytest
import typer
from documented import PAGES, ROOT

from ironmoe.bench.cli.app import app

BLOCK = re.compile(r"^```(?:bash|sh)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
STARTS = ("ironmoe ", ".venv/bin/ironmoe ", "torchrun ")


def commands(page):
    """Each command line in the blocks of code of a page that are no Python and no output."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
    return [line for line in lines if line.startswith(STARTS)]


LINES = [pytest.param(line, id=f"{page}: {line[:50]}") for page in PAGES for line in commands(page)]


def words_of(line):
    """What follows the name of the program, without comments, redirections and torchrun."""
    words = shlex.split(line.replace("…", ""), comments=True)
    for end in (">", "|", "&&"):
        words = words[: words.index(end)] if end in words else words
    if words[0] == "torchrun":
        words = words[words.index("ironmoe.bench") :]
    return words[1:]


def found(words):
    """(the command that words lead to, its arguments)"""
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{words[0]} is no command"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options_of(command):
    """Both names of each option, such as --all and --no-all."""
    return {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts, "--help")
    }


@pytest.mark.parametrize("line", LINES)
def test_a_documented_command_has_these_options(line):
    command, words = found(words_of(line))
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert given <= options_of(command)


def test_a_command_or_an_option_that_is_not_there_is_found():
    with pytest.raises(AssertionError, match="atack is no command"):
        found(words_of("ironmoe atack model"))
    command, _ = found(words_of("ironmoe attack model --epss 8"))
    assert "--epss" not in options_of(command) and "--eps" in options_of(command)


def test_the_page_of_commands_has_a_section_or_a_row_for_each():
    page = (ROOT / "docs" / "command.md").read_text()
    programs = typer.main.get_command(app).commands
    for name, command in programs.items():
        assert re.search(rf"ironmoe {name}\b|^## ironmoe .*\b{name}\b", page, re.MULTILINE), name
        for part in getattr(command, "commands", {}):
            assert f"`ironmoe {name} {part}`" in page, f"{name} {part}"
