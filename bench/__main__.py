"""``ironmoe`` and ``python -m ironmoe.bench``."""

import io
import os
import sys
import warnings
from typing import Any

EXTRA = ("typer", "rich", "matplotlib", "jinja2", "safetensors", "msgpack", "scipy", "PIL")
"""Modules of the extra ``bench`` that the commands import without asking."""


def main() -> None:
    """Run the command line. Where a package is missing that it needs, say how to install it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # "×" on a terminal that knows ASCII alone
    warnings.formatwarning = _one_line
    try:
        from ironmoe.bench.cli.app import app

        if os.environ.get("RANK", "0") == "0":
            app()
        else:
            sys.exit(_quietly(app))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        sys.exit(
            f"ironmoe: the command line needs the package {error.name!r}: pip install "
            "'ironmoe[bench]'"
        )


def _one_line(message: Warning | str, *place: Any, **_: Any) -> str:
    """A warning without a line of code: whoever runs a command has no code there."""
    return f"Warning: {message}\n"


def _quietly(app: Any) -> int:
    """The exit status of another process than the first. It prints nothing, because the first
    process says what is wrong with the arguments."""
    try:
        return int(app(standalone_mode=False) or 0)
    except Exception as error:
        if (status := getattr(error, "exit_code", None)) is None:
            raise
        from ironmoe.bench.common.processes import give_way

        give_way()
        return int(status)


if __name__ == "__main__":
    main()
