"""Which columns of a table are the images and the labels: of parquet files, and of data sets of
Hugging Face.

A column is found by its type, and then by its usual name. Where two remain, nobody guesses.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.data.decoding import read_image
from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import Item

IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "target", "category", "cls")
ROW_NUMBER = re.compile(r"(.*_)?(id|idx|index|row)|__index_level_\d+__|width|height|size")
"""Whole numbers that stand beside images and are no classes."""


class Columns(NamedTuple):
    """The columns of a table.

    image, label: their names. classes: the names of the classes that the file itself has; None:
    labels are indices of the logits, or names.
    """

    image: str
    label: str
    classes: list[str] | None


def arrow() -> Any:
    """The module ``pyarrow``.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"parquet files and data sets of Hugging Face are read by pyarrow: pip install "
            f"pyarrow ({error})"
        ) from error
    return pyarrow


def find_columns(
    schema: Any, origin: str, image: str | None = None, label: str | None = None
) -> Columns:
    """The columns of a schema of pyarrow.

    Args:
        schema: with Hugging Face's features in its metadata, where it comes from there.
        origin: how errors call the table.
        image, label: names that the user chose.

    Raises:
        DataError: there is no such column, or more than one.
    """
    features = _features(schema)
    types = arrow().types
    pictures = [
        field.name
        for field in schema
        if _is_picture(field.type, types) or _kind(features.get(field.name)) == "Image"
    ]
    numbers = [
        field.name
        for field in schema
        if types.is_integer(field.type) or _is_text(field.type, types)
    ]
    classes = [name for name in numbers if _kind(features.get(name)) == "ClassLabel"]

    # Whole numbers become floats where pandas had some missing.
    possible = numbers + [field.name for field in schema if types.is_floating(field.type)]
    named = [name for name in possible if name.lower() in LABEL_NAMES]
    others = [name for name in numbers if not ROW_NUMBER.fullmatch(name.lower())]

    chosen_image = _one("image", image, pictures, [pictures], IMAGE_NAMES, schema, origin)
    chosen_label = _one(
        "label", label, possible, [classes, named, others], LABEL_NAMES, schema, origin
    )
    names = features.get(chosen_label, {}).get("names")
    return Columns(chosen_image, chosen_label, None if names is None else [str(n) for n in names])


def numbered(values: list[Any], columns: Columns, origin: str) -> tuple[Tensor, list[str] | None]:
    """(labels (N,) int64, names of the classes or None) of what stands in the column of labels.

    Raises:
        DataError: an image has no label, or one that is no class.
    """
    column = f"column {columns.label!r} of {origin}"
    missing = next((row for row, value in enumerate(values) if _is_missing(value)), None)
    if missing is not None:
        raise DataError(
            f"{column} must have a label for each image, got {values[missing]} in row {missing}; "
            "a test set without labels cannot be judged"
        )

    texts = sum(isinstance(value, str) for value in values)
    if 0 < texts < len(values):
        raise DataError(f"{column} must be all numbers or all names, got both")
    if texts:
        names = sorted(set(values))
        place = {name: number for number, name in enumerate(names)}
        return torch.tensor([place[name] for name in values]), names

    broken = next((value for value in values if value != int(value)), None)
    if broken is not None:
        raise DataError(f"{column} must be whole numbers or names, got {broken}")
    labels = torch.tensor([int(value) for value in values])
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (columns.classes is not None and high >= len(columns.classes)):
        end = "on" if columns.classes is None else f"to {len(columns.classes) - 1}"
        raise DataError(f"{column} must be from 0 {end}, got values from {low} to {high}")
    return labels, columns.classes


def _is_missing(value: Any) -> bool:
    return value is None or value == -1 or (isinstance(value, float) and not math.isfinite(value))


def picture(value: Any, label: int, channels: int, where: str, folder: Path) -> Item:
    """The image in a cell: what a file holds, {"bytes": …, "path": …}, or null bytes and the path
    of a file below ``folder``.

    Raises:
        UnreadableImage: the cell is empty, or holds no picture.
    """
    held, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, "")
    if held is not None:
        return Item(read_image(held, channels, where), label)
    if not path:
        raise UnreadableImage(f"image {where} must have bytes or a path, got neither")
    return Item(read_image(folder / path, channels), label)


def _one(
    what: str,
    chosen: str | None,
    possible: list[str],
    candidates: list[list[str]],
    usual: tuple[str, ...],
    schema: Any,
    origin: str,
) -> str:
    """The column that the user chose among the possible ones; else the only one of the first kind
    that there is; else the only one of them with a usual name."""
    found = next((names for names in candidates if names), [])
    everything = ", ".join(f"{field.name} ({_type(field.type)})" for field in schema)
    if chosen is not None:
        if chosen in possible:
            return chosen
        raise DataError(
            f"{what} must be a column of {what}s of {origin}, got {chosen!r}; its columns are "
            f"{everything}"
        )

    named = [name for name in found if name.lower() in usual]
    for names in (found, named):
        if len(names) == 1:
            return names[0]
    raise DataError(
        f"{origin} must have one column of {what}s, got "
        f"{' and '.join(map(repr, named or found)) or 'none'}"
        f"{f'; name it by {what}=' if found else ''}. Its columns are {everything}"
    )


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face wrote about the columns; nothing if somebody else wrote the file."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = told["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _kind(feature: dict[str, Any] | None) -> str | None:
    return None if feature is None else feature.get("_type")


def _is_picture(kind: Any, types: Any) -> bool:
    if types.is_struct(kind):
        return "bytes" in [kind.field(number).name for number in range(kind.num_fields)]
    return str(kind).startswith(("binary", "large_binary", "fixed_size_binary"))


def _is_text(kind: Any, types: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in ("string", "large_string", "string_view")


def _type(kind: Any) -> str:
    text = str(kind)
    return text if len(text) <= 40 else f"{text[:37]}…"
