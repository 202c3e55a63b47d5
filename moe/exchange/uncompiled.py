"""Functions at which torch.compile stands aside."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function as compiled code calls it: torch.compile runs it, and all that it calls, as it
    is written. (``torch.compiler.disable`` imports the compiler, which takes a second.)"""
    disabled: list[Function] = []

    @wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        compiler = sys.modules.get("torch._dynamo")  # there once something is compiled
        if not hasattr(compiler, "disable"):
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(cast("Any", compiler).disable(function))
        return disabled[0](*args, **kwargs)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast("Function", outside)
