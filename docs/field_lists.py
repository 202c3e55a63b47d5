"""How the reference pages read a docstring that lists fields as lines ``name: text``.

A terminal shows such a list as it is written. Google's style, which the pages are read by, knows a
list only under a heading: without one the fields become one paragraph, and a field of several lines
becomes a box that has lost its name. So this gives each list its heading, and each field that
follows another one on its line, as in ``dim: D; num_experts: E``, a line of its own.
"""

import re
from collections.abc import Iterable
from typing import Any

import griffe

NAMES = r"[a-z_]\w*(?:, [a-z_]\w*)*"
FIELD = re.compile(rf"{NAMES}: +\S")
ERROR = re.compile(r"\w+Error(, \w+Error)*: +\S")
NEXT_FIELD = re.compile(rf";\s+({NAMES}):(?=\s)")
REMARK = re.compile(r"^Args \((.+)\):$", re.MULTILINE)
# Google's style takes a title behind its own heading. ``Attributes`` itself is no choice: griffe
# reads "low, high" under it as a name and a type.
ATTRIBUTES, ARGUMENTS, ERRORS = "Args: Attributes:", "Args:", "Raises:"


class FieldLists(griffe.Extension):
    """Reads the lists in the docstrings of all classes and functions."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is not None:
            made = cls.members.get("__init__")
            arguments = made.parameters if isinstance(made, griffe.Function) else ()
            names = {*cls.members, *(argument.name for argument in arguments)}
            cls.docstring.value = with_lists(cls.docstring.value, ATTRIBUTES, names)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            names = [argument.name for argument in func.parameters]
            func.docstring.value = with_lists(func.docstring.value, ARGUMENTS, names)


def with_lists(text: str, fields: str, names: Iterable[str]) -> str:
    """The docstring, with a heading over each list: ``fields`` over one of names. The first
    paragraph is never a list, because it says what the thing is."""
    summary, *paragraphs = REMARK.sub(_title, text).split("\n\n")
    done, above = [summary], ""

    for paragraph in paragraphs:
        heading = fields if _lists(FIELD, paragraph) else ""
        heading = ERRORS if _lists(ERROR, paragraph) else heading
        if heading:
            lines = "\n".join(f"    {line}" for line in paragraph.split("\n"))
            paragraph = lines if heading == above else f"{heading}\n{lines}"
        done.append(paragraph)
        above = heading

    return _a_line_each("\n\n".join(done), set(names))


def _lists(item: re.Pattern[str], paragraph: str) -> bool:
    """Whether each line is an item, or goes on with one by being indented."""
    first, *others = paragraph.split("\n")
    return bool(item.match(first)) and all(
        line.startswith("    ") or item.match(line) for line in others
    )


def _title(remark: re.Match[str]) -> str:
    """A title is no Markdown, so it has no backticks."""
    return f"Args: Parameters ({remark[1].replace('`', '')}):"


def _a_line_each(text: str, known: set[str]) -> str:
    """Other words before a colon, as in "; empty: none", are no names."""

    def parted(match: re.Match[str]) -> str:
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        in_list = line.startswith("    ") and known.issuperset(match[1].split(", "))
        return f"\n    {match[1]}:" if in_list else match[0]

    return NEXT_FIELD.sub(parted, text)
