"""pytest -p plugin: the kernel tests run on compiled code, each for sm_80 and for sm_90; what the
emulator reports fails the test.
"""

import json
import os
import pkgutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import driver
import hypothesis
import pytest
import selection
import summary

from ironmoe.kernels import tuning

CHIPS = ("sm_80", "sm_90")
EXAMPLES = 4  # of a property; each may compile its own kernels
# No shrinking: the interpreter's run does that
PHASES = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
ROWS = "EMULATED_ROWS"  # environment: the file in which all workers note their launches


def _import_kernels() -> None:
    """Triton decides when a kernel is imported whether it is compiled."""
    package = import_module("ironmoe.kernels.gpu")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"ironmoe.kernels.gpu.{module.name}")


_import_kernels()
driver.install()


def pytest_configure(config: Any) -> None:
    """The process that starts the workers makes the file for all of them."""
    if not hasattr(config, "workerinput"):
        descriptor, os.environ[ROWS] = tempfile.mkstemp(".jsonl", "emulated-")
        os.close(descriptor)


def pytest_generate_tests(metafunc: Any) -> None:
    """A test that has a device has two."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("chip_in_use", CHIPS, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """bfloat16 products, which the interpreter has not, are run; those of tf32 are not, for here
    torch has none to compare with.
    """
    # A test named on the command line alone is no reason to miss the others of its file.
    whole = not any("::" in argument for argument in config.args)
    if whole and (gone := selection.missing(items)):
        raise pytest.UsageError(f"tests/emulator/selection.py chooses what is not there: {gone}")
    left_out = [item for item in items if not selection.runs(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if selection.runs(item)]
    for item in items:
        if "tf32" not in item.name:
            item.own_markers = [
                mark
                for mark in item.own_markers
                if mark.kwargs.get("reason") != "no product of the interpreter"
            ]
        if hasattr(item.obj, "hypothesis"):
            settings = hypothesis.settings(
                item.obj._hypothesis_internal_use_settings, max_examples=EXAMPLES, phases=PHASES
            )
            item.obj._hypothesis_internal_use_settings = settings


@pytest.fixture(autouse=True)
def chip_in_use(request: Any) -> Iterator[None]:
    """The chip that kernels are compiled for, with as few processors as the interpreter has; no
    report may come of them.
    """
    name = getattr(request, "param", CHIPS[0])
    driver.driver.chip = int(name.removeprefix("sm_"))
    first = len(driver.launches)
    with tuning.assume(tuning.CHIPS[name]._replace(processors=tuning.INTERPRETER.processors)):
        yield
    made = driver.launches[first:]
    with open(os.environ[ROWS], "a") as file:
        file.writelines(json.dumps(launch._asdict()) + "\n" for launch in made)
    faults = [
        f"{launch.kernel} {launch.tile} {launch.chip}: {text}"
        for launch in made
        for text in launch.reports
    ]
    assert not faults, "\n".join(faults[:10])


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """The table, by the process that has the file."""
    if not hasattr(config, "workerinput"):
        path = Path(os.environ[ROWS])
        for line in summary.lines(path) if path.stat().st_size else ():
            terminalreporter.write_line(line)
        path.unlink()
