"""The options of a run on a GPU, checked before anything starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ironmoe.bench.benchmarks.chosen_shapes import select_shapes
from ironmoe.bench.benchmarks.gpu.jobs import KINDS, TESTS, TUNE
from ironmoe.bench.benchmarks.gpu.tasks.suite import ROOT, TEST_FOLDER
from ironmoe.bench.benchmarks.reference import TOLERANCE
from ironmoe.bench.benchmarks.shapes import REHEARSAL, SHAPES, Shape
from ironmoe.bench.common.choices import SHORT_DTYPES, chosen_names, named
from ironmoe.bench.common.dtypes import dtype_name
from ironmoe.bench.common.user_error import UserError

DTYPES = {dtype_name(dtype): dtype for dtype in TOLERANCE}


class OptionError(UserError):
    """An option has a value that cannot be used; the message is one line and says which are."""


class GpuOptions(NamedTuple):
    """What the command line says, checked.

    kinds: of the jobs, out of ``KINDS``; resume: go on with an interrupted run; out: a folder.
    """

    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    minutes: float
    kinds: tuple[str, ...]
    resume: bool
    out: Path


def make_options(
    *,
    device: str = "auto",
    dtype: str = "bfloat16",
    shapes: str | Sequence[str] | None = None,
    minutes: float = 9.0,
    only: str | None = None,
    skip_tests: bool = False,
    tune: bool = False,
    resume: bool = False,
    out: Path | None = None,
) -> GpuOptions:
    """Check what the command line gave: see ``__main__.py`` for what the options mean.

    Raises:
        OptionError: a value cannot be used, or there is no GPU.
    """
    device, dtype = device.lower(), named(SHORT_DTYPES.get(dtype.lower(), dtype), DTYPES)
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"--device must be auto, cpu or cuda, got {device!r}")
    if device != "cpu" and not torch.cuda.is_available():
        raise OptionError(
            "no GPU that torch can use; --device cpu rehearses the program on tiny shapes"
        )
    if dtype not in DTYPES:
        raise OptionError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 < minutes < float("inf"):
        raise OptionError(f"--minutes must be a number above 0, got {minutes}")
    kinds = select("--only", only, tuple(kind for kind in KINDS if kind != TUNE))
    kinds += (TUNE,) if tune and TUNE not in kinds else ()
    if skip_tests:
        kinds = tuple(kind for kind in kinds if kind != TESTS)

    return GpuOptions(
        device=torch.device("cpu" if device == "cpu" else "cuda"),
        dtype=DTYPES[dtype],
        shapes=select_shapes(shapes, REHEARSAL if device == "cpu" else SHAPES),
        minutes=minutes,
        kinds=kinds,
        resume=resume,
        out=out or (ROOT if TEST_FOLDER.is_dir() else Path.cwd()) / "bench" / "results",
    )


def select(
    option: str, names: str | None, default: tuple[str, ...], known: tuple[str, ...] = tuple(KINDS)
) -> tuple[str, ...]:
    """The names in ``names``, separated by commas, in any case; None is the default.

    Raises:
        OptionError: a name is not known. ``option`` is what the message calls it.
    """
    return default if names is None else chosen_names(option, names, known, OptionError)
