"""The table of other libraries' arguments in docs/attacks.md, made from what the classes declare.

Write it anew with ``python tests/support/alias_table.py``.
"""

import re
from pathlib import Path

from ironmoe.attacks import registry
from ironmoe.attacks.aliases.declared import Turned
from ironmoe.attacks.aliases.own import alias_of, declared_in

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"
BEGIN, END = "<!-- aliases: begin -->\n", "<!-- aliases: end -->\n"
COMMAND = "python tests/support/alias_table.py"


def table():
    """In Markdown, one row for each name that a class declares."""
    lines = ["| attack | argument | here |", "|" + " --- |" * 3]
    for base in declaring():
        for name, alias in declared_in(base).items():
            lines.append(f"| {attacks_with(base, name)} | `{name}` | {meaning(alias)} |")
    return "\n".join(lines) + "\n"


def declaring():
    """The classes that declare names: what all share first, then in the order of the register."""
    bases = dict.fromkeys(
        base for entry in registry.ATTACKS.values() for base in entry.kind.__mro__[::-1]
    )
    return [base for base in bases if declared_in(base)]


def attacks_with(base, name):
    """The registered attacks for which this class decides what the name means."""
    alias = declared_in(base)[name]
    kinds = [entry.kind for entry in registry.ATTACKS.values()]
    mine = [kind for kind in kinds if alias_of(kind, name) is alias and issubclass(kind, base)]
    if base.__name__ == "Attack" and isinstance(alias, str):
        return f"every attack with `{alias}`"
    if base.__name__ == "Attack":
        others = [kind.__name__ for kind in kinds if kind not in mine]
        return "every attack" + (f" but `{'`, `'.join(others)}`" if others else "")
    return ", ".join(f"`{kind.__name__}`" for kind in mine)


def meaning(alias):
    """What the argument is here, in a cell."""
    if isinstance(alias, str):
        return f"`{alias}`"
    if isinstance(alias, Turned):
        return f"`{alias.into}`: {alias.example!r} there is {alias.how(alias.example)!r} here"
    if len(alias.values) > 2:
        allowed = f"from {min(alias.values)} to {max(alias.values)}"
    else:
        allowed = " or ".join(f"`{value!r}`" for value in alias.values)
    return f"{f'{allowed} alone' if allowed else 'refused'}: {alias.instead}"


def with_table(page):
    """The text of the page with the table of today."""
    return re.sub(f"(?<={BEGIN}).*(?={END})", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
