"""The class of every command: its help has the layout of ``layout.py`` and the panels of
``panels.py``.

Typer has click's classes under a name of its own in some versions, so they are ``Any`` here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from ironmoe.bench.cli.help.late_help import with_late_help
from ironmoe.bench.cli.help.layout import entry, filled, in_panels, paragraphs, signature, width_of
from ironmoe.bench.cli.help.panels import PANELS

Function = TypeVar("Function", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command whose help fits the terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = width_of(ctx)
        panels = PANELS.get(_path(ctx), {})
        with with_late_help(self.params):
            options = in_panels(self.get_params(ctx), panels, width)
            formatter.write("\n".join([*_head(self, ctx, width), *options]))


class Group(TyperGroup):
    """The same for what has commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = width_of(ctx)
        lines = [*_head(self, ctx, width), typer.style("Commands:", bold=True)]
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None:
                lines += entry(name, (command.help or "").partition("\n\n")[0], width)
        options = in_panels(self.get_params(ctx), {}, width)
        formatter.write("\n".join([*lines, "", *options]))


class Commands(typer.Typer):
    """A ``typer.Typer`` whose commands have this help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, rich_markup_mode=None, **options)

    def command(self, *name: Any, **options: Any) -> Callable[[Function], Function]:
        return super().command(*name, **{"cls": Command, **options})


def _head(command: Any, ctx: Any, width: int) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    what = ["COMMAND"] if isinstance(command, Group) else map(signature, arguments)
    usage = " ".join(["Usage:", ctx.command_path, "[OPTIONS]", *what])
    return [*filled(usage, width), "", *paragraphs(command.help or "", width)]


def _path(ctx: Any) -> str:
    """The command's name without that of the program: ``bench cpu``."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name)
        ctx = ctx.parent
    return " ".join(names)
