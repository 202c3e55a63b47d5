"""Warnings that point at the line of the user's program that caused them."""

import sys
import warnings

LIBRARIES = ("ironmoe", "torch")


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn with the file and line of the nearest caller outside of this library and of torch,
    whose ``Module.__call__`` may stand between the two."""
    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_of_a_library(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


def _is_of_a_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES
