"""What ``pip install ironmoe`` without an extra leaves out, and what is said then."""

import subprocess
import sys

import pytest
from import_graph import ROOT

from ironmoe.bench.__main__ import EXTRA

OTHER_NAMES = {"PIL": "pillow"}
BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Nothing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Nothing())
"""


def without(missing, program, *arguments):
    """The program in a process of its own, in which these modules are not installed."""
    code = BLOCKED.format(missing=set(missing)) + program
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [
        ("typer", ["--help"]),
        ("rich", ["--version"]),
        ("matplotlib", ["demo", "--data", "digits"]),
    ],
)
def test_the_command_says_in_one_line_what_to_install(missing, arguments, tmp_path):
    program = "from ironmoe.bench.__main__ import main; main()"
    done = without([missing], program, *arguments)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"ironmoe: the command line needs the package {missing!r}: pip install 'ironmoe[bench]'"
    ]


def test_the_extra_has_what_the_command_says_it_has():
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.partition("\nbench = [")[2].partition("\n]")[0]
    for module in EXTRA:
        assert f'"{OTHER_NAMES.get(module, module)}>=' in listed


def test_the_library_needs_no_extra():
    """The floors below the command, with no more than torch, einops and numpy."""
    missing = {*EXTRA, "sklearn", "mlxtend", "transformers", "pyarrow", "datasets", "triton"}
    program = (
        "import torch, ironmoe.kernels, ironmoe.moe as moe, ironmoe.attacks as attacks\n"
        "model = moe.VMoE(8, 4, 16, 1, 2, 32, 5, channels=1, classifier='gap').eval()\n"
        "images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])\n"
        "print(attacks.PGD(model, 8 / 255, steps=2)(images, labels).shape)\n"
    )
    done = without(missing, program)
    assert done.stdout == "torch.Size([2, 1, 8, 8])\n", done.stderr
