"""Libraries that some kinds of models need: imported, or an error that says how to get them."""

import importlib
from typing import Any

import torch

from ironmoe.bench.common.errors import told
from ironmoe.moe.checkpoints.errors import CheckpointError

# torchvision 0.15 was made for torch 2.0, 0.16 for torch 2.1, and so on
# (https://github.com/pytorch/vision#installation)
OF_TORCH_2 = 15
ELSEWHERE = {"robustbench": "git+https://github.com/RobustBench/robustbench.git"}
"""What to install where the newest release on PyPI is an old one."""


def imported(name: str, wanted_by: object) -> Any:
    """The module ``name``. wanted_by: what needs it, as errors begin.

    Raises:
        CheckpointError: it is not installed, or its import fails; the message has the command that
            puts this right.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:  # a torchvision of another torch raises RuntimeError, for one
        raise CheckpointError(f"{wanted_by} {why_not(error, name)}") from error


def why_not(error: Exception, package: str) -> str:
    """Why an import of ``package``, or of a part of it, failed, and what to do."""
    top = package.partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        whose = "" if missing == top else f"{top}, which needs "
        return f"needs {whose}the package {missing}, which is not installed: {command_for(missing)}"
    if "torchvision" in str(error) or "torchvision" in _modules_of(error):
        return (
            f"needs {top}, whose import fails because the installed torchvision was built for "
            f"another torch than {torch.__version__} ({told(error)}); install the torchvision that "
            f"belongs to this torch: {torchvision_command()}"
        )
    return f"needs {top}, whose import fails: {told(error)}"


def command_for(package: str) -> str:
    """How to install a package."""
    if package == "torchvision":
        return torchvision_command()
    return f"pip install {ELSEWHERE.get(package, package)}"


def torchvision_command() -> str:
    """How to install the torchvision that belongs to the torch that runs."""
    number, _, build = torch.__version__.partition("+")
    major, minor = number.split(".")[:2]
    version = f"==0.{int(minor) + OF_TORCH_2}.*" if major == "2" else ""
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install --force-reinstall --no-deps 'torchvision{version}'{index}"


def _modules_of(error: BaseException) -> set[str]:
    """The top-level modules whose lines the error passed through."""
    modules, step = set(), error.__traceback__
    while step is not None:
        modules.add(str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0])
        step = step.tb_next
    return modules
