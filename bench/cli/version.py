"""``ironmoe --version``. It imports no torch, which takes seconds."""

import typer


def print_version(asked: bool) -> None:
    """Print the versions in one line and end the program, if they were asked for."""
    if asked:
        typer.echo(version_line())
        raise typer.Exit


def version_line() -> str:
    """``ironmoe 0.1.0 (commit 1a2b3c4d5e6f), torch 2.13.0+cpu, Python 3.11.4``."""
    from ironmoe.bench.common.machine.provenance import commit
    from ironmoe.bench.common.machine.versions import versions

    found, changes = versions(), commit()
    where = "" if changes is None else f" (commit {_short(changes)})"
    return f"ironmoe {found['ironmoe']}{where}, torch {found['torch']}, Python {found['python']}"


def _short(commit: str) -> str:
    name, *changed = commit.split("-")
    return "-".join([name[:12], *changed])
