"""Which columns of a table are the images and the labels: of parquet files, and of data sets of
Hugging Face.

A column of images is found by its type, and then by its usual name; one of labels by the names of
classes that Hugging Face wrote beside it, or by its usual name. Where two remain, or none, nobody
guesses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.data.decoding import read_image
from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.image_set import LARGEST_LABEL, Item

IMAGE_NAMES = ("image", "img", "jpg", "png", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_name", "target", "category", "cls")
RARE_LABEL_NAMES = ("wnid", "synset")
"""Names of columns of labels, where there is none of ``LABEL_NAMES``."""


class Columns(NamedTuple):
    """The columns of a table.

    image, label: their names. classes: the names of the classes that the file itself has; None:
    labels are indices of the logits, or names. note: what people should know of the choice.
    """

    image: str
    label: str
    classes: list[str] | None
    note: str = ""


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
    named, rare = _called(possible, LABEL_NAMES), _called(possible, RARE_LABEL_NAMES)

    chosen_image = _one("image", image, pictures, [pictures], IMAGE_NAMES, schema, origin)
    chosen_label = _one(
        "label", label, possible, [classes, named, rare], LABEL_NAMES, schema, origin
    )
    others = [name for name in possible if name != chosen_label and "label" in name.lower()]
    note = "" if label is not None or not others else _of_others(chosen_label, others)
    names = features.get(chosen_label, {}).get("names")
    known = None if names is None else [str(each) for each in names]
    return Columns(chosen_image, chosen_label, known, note)


def _of_others(chosen: str, others: list[str]) -> str:
    are = f"{', '.join(map(repr, others))} {'is one' if len(others) == 1 else 'are some'}"
    return f"Labels are the column {chosen!r}; {are}, too, and label= takes another."


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
    low, high = int(min(values)), int(max(values))
    if low < 0 or (columns.classes is not None and high >= len(columns.classes)):
        end = "on" if columns.classes is None else f"to {len(columns.classes) - 1}"
        raise DataError(f"{column} must be from 0 {end}, got values from {low} to {high}")
    if high > LARGEST_LABEL:
        raise DataError(f"{column} must be below 2**63, got {high}")
    return torch.tensor([int(value) for value in values]), columns.classes


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
    everything = ", ".join(f"{field.name} ({_type(field.type)})" for field in schema)
    if chosen is not None:
        if chosen in possible:
            return chosen
        raise DataError(
            f"{what} must be a column of {what}s of {origin}, got {chosen!r}; its columns are "
            f"{everything}"
        )

    found = next((names for names in candidates if names), [])
    unusable = [name for name in _called(schema.names, usual) if name not in possible]
    if unusable and not _called(possible, usual):
        raise DataError(
            f"{origin} must have one column of {what}s, got {unusable[0]!r} of type "
            f"{_type(schema.field(unusable[0]).type)}, which holds none; if another one does, name "
            f"it by {what}=. Its columns are {everything}"
        )
    named = _called(found, usual)
    for names in (found, named):
        if len(names) == 1:
            return names[0]
    raise DataError(
        f"{origin} must have one column of {what}s, got "
        f"{' and '.join(map(repr, named or found)) or 'none of a usual name'}"
        f"{f'; name it by {what}=' if possible else ''}. Its columns are {everything}"
    )


def _called(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Those of the names that are among the usual ones, which are in small letters."""
    return [name for name in names if name.lower() in usual]


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
