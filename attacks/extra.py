"""Further inputs of the model, one entry an example: they travel with the row of their example.

Attempts carry them as columns named "extra.0", "extra.1", … for arguments by position, and
"extra.name" for those by keyword.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Extra = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

PREFIX = "extra."


def extra_columns(extra: Any, count: int) -> dict[str, Tensor]:
    """The columns of ``extra``: one tensor (N, …), a tuple of them, or a dict of them by name.

    Raises:
        TypeError: it is none of these.
        ValueError: a tensor has not N entries.
    """
    if extra is None:
        return {}
    if isinstance(extra, Mapping):
        named = {str(name): value for name, value in extra.items()}
    elif isinstance(extra, tuple | list):
        named = {str(place): value for place, value in enumerate(extra)}
    else:
        named = {"0": extra}

    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                "extra must be a tensor, a tuple of tensors or a dict of tensors, one entry an "
                f"example, got {type(value).__name__} for {name!r}"
            )
        if not value.ndim or len(value) != count:
            raise ValueError(
                f"extra must have one entry for each of {count} examples, got {tuple(value.shape)} "
                f"for {name!r}"
            )
    return {PREFIX + name: value for name, value in named.items()}


def check_taken(model: Any, columns: Mapping[str, Tensor], got: str) -> None:
    """TypeError: by its signature, the model does not take these inputs beside its images."""
    forward = getattr(model, "forward", model)
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return  # what it takes cannot be known
    by_position, by_keyword = further_inputs(columns)
    try:
        signature.bind(None, *by_position, **by_keyword)
    except TypeError as error:
        names = [name.removeprefix(PREFIX) for name in columns]
        raise TypeError(
            f"{got}, where the model does not take further inputs {names} beside its images: "
            f"{error}"
        ) from None


def cut(extra: Any, count: int, places: slice | Tensor) -> Any:
    """The extra inputs of some of ``count`` examples, in the form that they came in."""
    columns = extra_columns(extra, count)
    return {name.removeprefix(PREFIX): column[places] for name, column in columns.items()} or None


def further_inputs(columns: Mapping[str, Tensor] | None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(arguments by position, arguments by keyword) of a call of the model, in copies: a model may
    write on its inputs."""
    by_position: dict[int, Tensor] = {}
    by_keyword: dict[str, Tensor] = {}
    for column, value in (columns or {}).items():
        if column.startswith(PREFIX):
            name = column.removeprefix(PREFIX)
            if name.isdecimal():
                by_position[int(name)] = value.clone()
            else:
                by_keyword[name] = value.clone()
    return [by_position[place] for place in sorted(by_position)], by_keyword
