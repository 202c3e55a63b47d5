"""Functions that torch.compile leaves out of its graphs."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def outside_graphs(function: _Function) -> _Function:
    """The function, which compiled code calls as it is: an exchange has sizes that other ranks say.
    (``torch.compiler.disable`` does it, and imports the compiler, which takes a second.)"""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = function
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled
            run = torch.compiler.disable(function)
        return run(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
