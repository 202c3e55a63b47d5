"""Where a report or a file of rows comes from: date, version, commit, command line, machine."""

import hashlib
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from ironmoe.bench.common.machine.versions import versions

CHECKOUT = Path(__file__).resolve().parents[3]
PROGRAMS = "ironmoe.bench"
PACKAGES = ("attacks", "bench", "kernels", "moe")  # folders of CHECKOUT, and of what is installed
CODE = (".py", ".jinja", ".npz", ".tsv", ".xz")  # endings of what the code is, and of what it opens


def provenance() -> dict[str, Any]:
    """What reports and bench files hold under "made".

    Keys: "date" (UTC, ISO 8601), "ironmoe" (version), "commit" (None where ironmoe does not run
    from a checkout; "-changed" behind it where files differ from that commit), "code"
    (``code_digest``), "command", "machine" (``hardware``) and "versions" of the packages that
    matter.
    """
    from ironmoe.bench.common.machine.hardware import hardware  # torch takes seconds

    found = versions()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ironmoe": found["ironmoe"],
        "commit": commit(),
        "code": code_digest(),
        "command": command_line(),
        "machine": hardware(),
        "versions": found,
    }


def command_line() -> str:
    """The command of this process, to be pasted into a shell."""
    program, *arguments = sys.argv
    main = sys.modules["__main__"]
    package = getattr(main.__spec__, "parent", None) if getattr(main, "__spec__", None) else None
    if package == PROGRAMS or Path(program).name == "ironmoe":
        return shlex.join(["ironmoe", *arguments])
    if package:
        return shlex.join(["python", "-m", package, *arguments])
    return shlex.join(["python", program, *arguments])


@cache
def commit() -> str | None:
    """The commit of the checkout that this file lies in; None for an installed package."""
    if not (CHECKOUT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-changed" if changed else head


@cache
def code_digest() -> str:
    """A name for the code itself: 12 hexadecimal digits of its files' names and bytes, wherever
    they lie."""
    files = (file for name in PACKAGES for file in (CHECKOUT / name).rglob("*"))
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.suffix in CODE and file.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(CHECKOUT).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(CHECKOUT), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.strip()
