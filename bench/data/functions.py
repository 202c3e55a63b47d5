"""``package.module:function?key=value`` as data: what a Python function returns."""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ironmoe.attacks.data import DataError, ImageSet, ImageStream, LoaderStream, images_of
from ironmoe.bench.common.errors import told
from ironmoe.bench.common.query import read_value


def data_of_function(name: str, query: Mapping[str, str]) -> ImageSet | ImageStream | LoaderStream:
    """The data set, loader or batches that the function returns.

    Args:
        name: "package.module:function"; the folder of the command is on the path.
        query: its keyword arguments, as text.

    Raises:
        DataError: it cannot be imported, raises, or returns something else.
    """
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # it stays there: workers import the module, too
    try:
        made = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever somebody else's module may raise
        raise DataError(f"--data {name} cannot be imported: {told(error)}") from error

    arguments: dict[str, Any] = {key: read_value(text) for key, text in query.items()}
    if not callable(made) or hasattr(made, "__getitem__") or hasattr(made, "__iter__"):
        if arguments:
            raise DataError(f"--data {name} is no function and takes no arguments, got {arguments}")
        return images_of(made, name=function)
    try:
        given = made(**arguments)
    except Exception as error:
        raise DataError(
            f"--data {name} must be a function that takes {arguments or 'no arguments'}, and "
            f"calling it failed: {told(error)}"
        ) from error
    if isinstance(given, Iterator):  # it can be gone through once, the function many times
        given = LoaderStream(_MadeAgain(made, arguments), name=function)
    return images_of(given, name=function)


class _MadeAgain:
    """The batches of a generator function, each time from the beginning."""

    def __init__(self, function: Callable[..., Iterator[Any]], arguments: dict[str, Any]) -> None:
        self.function = function
        self.arguments = arguments

    def __iter__(self) -> Iterator[Any]:
        return self.function(**self.arguments)
