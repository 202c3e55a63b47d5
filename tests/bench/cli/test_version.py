"""``ironmoe --version``."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from ironmoe.bench.cli import version
from ironmoe.bench.cli.app import app
from ironmoe.bench.common.machine import provenance


@pytest.mark.parametrize(
    ("commit", "told"),
    [
        (None, ""),
        ("0123456789abcdef" * 2, " (commit 0123456789ab)"),
        ("0123456789abcdef-changed", " (commit 0123456789ab-changed)"),
    ],
)
def test_one_line_names_version_commit_torch_and_python(commit, told, monkeypatch):
    monkeypatch.setattr(provenance, "commit", lambda: commit)
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    python = ".".join(map(str, sys.version_info[:3]))
    (line,) = result.output.splitlines()
    assert line.startswith("ironmoe ")
    assert line.endswith(f"{told}, torch {torch.__version__}, Python {python}")
    assert line == version.version_line()


def test_version_and_help_import_no_torch():
    """It takes seconds."""
    program = (
        "import sys; from typer.testing import CliRunner; from ironmoe.bench.cli.app import app; "
        "[print(CliRunner().invoke(app, [option]).exit_code) for option in "
        "('--version', '--help')]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "0", "False"], done.stderr
