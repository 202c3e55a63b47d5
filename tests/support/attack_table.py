"""The table of attacks in docs/attacks.md, made from the register of attacks.

Write it anew with ``python tests/support/attack_table.py``.
"""

import re
from pathlib import Path

from ironmoe.attacks import registry

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"
BEGIN, END = "<!-- attacks: begin -->\n", "<!-- attacks: end -->\n"
COMMAND = "python tests/support/attack_table.py"


def table():
    """In Markdown, one row for each registered class."""
    lines = [
        "| attack | norms | names in `ironmoe attack` | source | what it does |",
        "|" + " --- |" * 5,
    ]
    for entry in registry.ATTACKS.values():
        names = ", ".join(f"`{name}`" for name in entry.names) or "–"
        norms = ", ".join(entry.kind.norms)
        row = (f"`{entry.kind.__name__}`", norms, names, entry.source, entry.summary)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def with_table(page):
    """The text of the page with the table of today."""
    return re.sub(f"(?<={BEGIN}).*(?={END})", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
