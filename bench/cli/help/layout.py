"""How the help of a command is laid out: plain text that fits the terminal and cuts no word.

An option stands on a line of its own, above what it does, so that the text has the whole width
however long the names are. Examples are printed as they were written, to be pasted.
"""

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import typer

INDENT = 6
WIDEST, NARROWEST = 100, 40  # longer lines are hard to read
HELD = "\N{NO-BREAK SPACE}"
METAVARS = {
    "str": "TEXT",
    "text": "TEXT",
    "int": "N",
    "integer": "N",
    "float": "NUMBER",
    "path": "PATH",
}
"""What follows an option, by the type's name in any version of typer."""


def width_of(ctx: Any) -> int:
    """Columns that help may take."""
    columns = ctx.terminal_width or shutil.get_terminal_size().columns
    return int(min(max(columns, NARROWEST), WIDEST))


def paragraphs(text: str, width: int) -> list[str]:
    """The lines of a docstring. A paragraph that is indented keeps its lines, the others are filled
    anew."""
    lines: list[str] = []
    for paragraph in text.strip("\n").split("\n\n"):
        block = paragraph.startswith("    ")
        shown = textwrap.dedent(paragraph).splitlines() if block else filled(paragraph, width)
        lines += [f"  {line}" if block else line for line in shown] + [""]
    return lines


def filled(text: str, width: int, indent: int = 0) -> list[str]:
    """The text in lines of at most ``width`` columns, unless one word is longer."""
    plain = text.replace("**", "").replace("`", "").replace("[default: ", f"[default:{HELD}")
    lines = textwrap.wrap(
        plain,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(HELD, " ") for line in lines]


def entry(name: str, text: str, width: int) -> list[str]:
    """An option or a command, and below it what it does."""
    return [f"  {typer.style(name, bold=True)}", *filled(text, width, INDENT)]


def in_panels(params: Iterable[Any], panels: Mapping[str, str], width: int) -> list[str]:
    """The parameters under the titles that ``panels`` gives them, in its order.

    panels: title → names of parameters, separated by blanks. What has no place there comes last.
    """
    shown = [param for param in params if not getattr(param, "hidden", False)]
    places = {name: title for title, names in panels.items() for name in names.split()}
    rest = "Other options" if panels else "Options"

    lines: list[str] = []
    for title in (*panels, rest):
        order = panels.get(title, "").split()
        inside = [param for param in shown if places.get(param.name, rest) == title]
        inside.sort(key=lambda param: order.index(param.name) if order else 0)
        if inside:
            lines.append(typer.style(f"{title}:", bold=True))
            for param in inside:
                lines += entry(signature(param), _text(param), width)
            lines.append("")
    return lines


def signature(param: Any) -> str:
    """``--eps TEXT``, ``--checks / --no-checks``, ``[CHECKPOINT]``."""
    if param.param_type_name == "argument":
        name = param.metavar or param.name.upper()
        return name if param.required else f"[{name}]"

    names = ", ".join(param.opts)
    if param.is_flag:
        return " / ".join([names, *param.secondary_opts])
    value = param.metavar or METAVARS.get(_type_name(param), "TEXT")
    return f"{names} {value}"


def _type_name(param: Any) -> str:
    name = param.bare_type() if hasattr(param, "bare_type") else param.type.name
    return str(name).lower().removeprefix("list[").removesuffix("]")


def _text(param: Any) -> str:
    """What a parameter does, and its default where the text cannot be expected to say it."""
    text = param.help or ""
    if param.param_type_name == "argument" or param.default in (None, ""):
        return text
    if not param.is_flag:
        return f"{text} [default: {param.default}]"
    if param.secondary_opts:
        chosen = param.opts if param.default else param.secondary_opts
        return f"{text} [default: {chosen[0]}]"
    return text
