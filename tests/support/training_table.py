"""The table of training methods in docs/training.md, made from the register of methods.

Write it anew with ``python tests/support/training_table.py``.
"""

import re
from pathlib import Path

from ironmoe.attacks.training import TRAINING_METHODS

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"
COMMAND = "python tests/support/training_table.py"


def table():
    """In Markdown, one row for each registered class."""
    lines = [
        "| method | in `ironmoe train` | what is trained on | cost | options | source |",
        "|" + " --- |" * 6,
    ]
    for entry in TRAINING_METHODS.values():
        row = (
            f"`{entry.kind.__name__}`",
            f"`{entry.name}`" + (", with experts" if entry.needs_experts else ""),
            entry.summary,
            entry.cost,
            ", ".join(f"`{option}`" for option in entry.takes) or "–",
            entry.source or "–",
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def with_table(page):
    """The text of the page with the table of today."""
    return re.sub(f"(?<={BEGIN}).*(?={END})", lambda _: table(), page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
