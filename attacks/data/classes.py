"""From the labels of a set to the logits of a model: by name, by WordNet id, by index, or by a
given map. What is a guess is said."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.data.errors import DataError
from ironmoe.attacks.data.imagenet import (
    CLASSES,
    ModelNames,
    NameIndex,
    are_imagenet,
    imagenet_classes,
    imagenet_names,
    plain,
)

GIVE_A_MAP = "give a class map, which names the logit of each class"
HEADERS = ("logit", "index", "label", "id", "target", "class")
NUMBER = re.compile(r"-?\d+")
UNNAMED = re.compile(r"label_\d+")
"""What transformers calls the classes of a model that has no names."""


class Matched(NamedTuple):
    """The labels of a set in the logits of a model.

    logits: (L,) int64, for each label the index of its logit; None: labels are indices already.

    names: of the classes, by index of the logits.

    note: how they were matched where that is not plain; empty: by name, or by index.
    """

    logits: Tensor | None
    names: list[str]
    note: str = ""


def match_classes(
    names: Sequence[str] | None,
    labels: Tensor | None,
    logits: int,
    *,
    model_names: Sequence[str] | None = None,
    class_map: Mapping[str, int | str] | None = None,
    model: str = "the model",
) -> Matched:
    """Find the logit of each class of a set. The set may have any part of the model's classes.

    Args:
        names: of the set's classes, by label; None: labels are indices of the logits.
        labels: (N,) int64, those of the set if they are known, which are checked.
        logits: how many the model has.
        model_names: of the model's classes, by index; None: nobody knows.
        class_map: name, or label as text, → index of the logit, or a name of the model's.
        model: how errors call it.

    Raises:
        DataError: a class has no logit, or labels are no indices of logits.
    """
    if model_names is not None and len(model_names) != logits:
        raise DataError(
            f"{model} must have a name for each of its {logits} logits, got {len(model_names)}"
        )
    known = None if model_names is None or _are_unnamed(model_names) else list(model_names)

    if class_map is not None:
        return _by_map(names, labels, class_map, logits, known)
    if names is None:
        _check_indices(labels, logits, model)
        return Matched(None, known or _numbers(logits))
    return _by_name(list(names), logits, known, model)


def read_class_map(path: Path | str) -> dict[str, int | str]:
    """A class map from a file: JSON, an object from class to logit; or CSV or text with a class and
    a logit in each line. A logit is an index, or a name of the model's.

    Raises:
        DataError: it cannot be read, or names a class twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
            pairs = list(json.loads(text, object_pairs_hook=list))
        else:
            pairs = _lines(text)
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise DataError(f"class map {path} cannot be read: {error}") from error

    found: dict[str, int | str] = {}
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or isinstance(pair[1], bool):
            raise DataError(f"class map {path} must map classes to logits, got {pair!r}")
        name, logit = str(pair[0]).strip(), pair[1]
        if isinstance(logit, str):
            logit = int(logit) if logit.strip().isdecimal() else logit.strip()
        if not isinstance(logit, int | str):
            raise DataError(f"class map {path} must map classes to logits, got {logit!r}")
        if found.setdefault(name, logit) != logit:
            raise DataError(f"class map {path} must name each class once, got {name!r} twice")
    return found


def _lines(text: str) -> list[tuple[str, str]]:
    """The pairs of CSV, TSV, or text in which the last word of a line is the logit. A first line
    that names the columns is none."""
    if "," in text or "\t" in text:
        separator = "\t" if "\t" in text else ","
        rows = list(csv.reader(io.StringIO(text), delimiter=separator, skipinitialspace=True))
    else:
        rows = [line.rsplit(maxsplit=1) for line in text.splitlines()]
    short = next((row for row in rows if len(row) == 1), None)
    if short is not None:
        raise ValueError(f"a line without a logit, {short[0]!r}")
    pairs = [(row[0], row[1]) for row in rows if row]
    is_header = bool(pairs) and pairs[0][1].strip().lower() in HEADERS
    return pairs[1:] if is_header else pairs


def _by_map(
    names: Sequence[str] | None,
    labels: Tensor | None,
    class_map: Mapping[str, int | str],
    logits: int,
    known: Sequence[str] | None,
) -> Matched:
    own = None if known is None else ModelNames(known)
    given: dict[str, int] = {}
    for name, logit in class_map.items():
        by_name = own.find(logit) if own and isinstance(logit, str) else None
        found = by_name if isinstance(logit, str) else logit
        if found is None or not 0 <= found < logits:
            raise DataError(
                f"class map must map to an index from 0 to {logits - 1}, or to a name of the "
                f"model's, got {logit!r} for {name!r}"
            )
        given[name] = found

    if names is None:
        return _by_map_of_numbers(labels, given, logits, known)
    index = NameIndex(given.items())
    places = [index.find(name) for name in names]
    missing = [name for name, place in zip(names, places, strict=True) if place is None]
    if missing:
        raise DataError(f"class map must name every class of the data, got none for {few(missing)}")
    found_logits = torch.tensor(places)
    first = {place: name for name, place in reversed([*zip(names, places, strict=True)])}
    joined = [name for name, place in zip(names, places, strict=True) if first[place] != name]
    note = f"The class map joins classes at one logit, first {joined[0]!r}." if joined else ""
    return Matched(found_logits, _named(names, found_logits, logits, known), note)


def _by_map_of_numbers(
    labels: Tensor | None, given: Mapping[str, int], logits: int, known: Sequence[str] | None
) -> Matched:
    numbers = {int(name): logit for name, logit in given.items() if name.isdecimal()}
    used = sorted(numbers) if labels is None else labels.unique().tolist()
    missing = [str(label) for label in used if label not in numbers]
    if missing or not numbers:
        none_for = few(missing) if missing else f"numbers, but {few(list(given))}"
        raise DataError(f"class map must name every label of the data, got none for {none_for}")

    found = torch.full((max(numbers, default=-1) + 1,), -1)
    for label, logit in numbers.items():
        found[label] = logit
    return Matched(found, list(known or _numbers(logits)), "")


def _by_name(names: list[str], logits: int, known: list[str] | None, model: str) -> Matched:
    own = None if known is None else ModelNames(known)
    if own is not None and known is not None:
        found = [own.find(name) for name in names]
        if None not in found:
            return Matched(_apart(names, found), known)

    if logits == CLASSES and (known is None or are_imagenet(known)):
        standard = imagenet_names()
        found = [standard.find(name) for name in names]
        if None not in found:
            is_sure = known is not None
            guess = (
                f"{model} gives no names of its 1000 classes, so the classes of the data were "
                "matched to the standard order of ImageNet's, which is a guess."
            )
            of_classes = known or [", ".join(each.synonyms) for each in imagenet_classes()]
            return Matched(_apart(names, found), of_classes, "" if is_sure else guess)

    if all(NUMBER.fullmatch(name) for name in names):
        numbers = _apart(names, [int(name) for name in names])
        _check_indices(numbers, logits, model)
        note = "The names of the classes are numbers, and were taken as indices of the logits."
        if [int(name) for name in sorted(names)] != list(range(len(names))):
            note = (
                f"{note[:-1]}, which is a guess: torchvision's ImageFolder numbers folders in the "
                "order of their text."
            )
        return Matched(numbers, known or _numbers(logits), note)

    if len(names) != logits or _some_are_known(names, logits, own):
        raise DataError(_unmatched(names, logits, known, model))
    unknown = (
        "gives no names of classes"
        if known is None
        else f"calls its classes otherwise ({few(known)})"
    )
    pairs = few([f"logit {number} is {name!r}" for number, name in enumerate(names)])
    note = f"{model} {unknown}, so they were matched by number, which is a guess: {pairs}."
    return Matched(torch.arange(logits), names, note)


def _some_are_known(names: Sequence[str], logits: int, own: ModelNames | None) -> bool:
    """Whether some of the names say where they belong, so that their number is no guess for the
    others."""
    if own is not None:
        return any(name in own for name in names)
    return logits == CLASSES and 2 * sum(name in imagenet_names() for name in names) > CLASSES


def _apart(names: Sequence[str], found: Sequence[int | None]) -> Tensor:
    """The indices; DataError if two classes of the data have the same."""
    first: dict[int | None, str] = {}
    for name, index in zip(names, found, strict=True):
        other = first.setdefault(index, name)
        if other != name:
            raise DataError(
                f"classes of the data must have a logit each, got {other!r} and {name!r} for logit "
                f"{index}; {GIVE_A_MAP}"
            )
    return torch.tensor(found)


def _unmatched(names: list[str], logits: int, known: list[str] | None, model: str) -> str:
    """Why the classes of the data have no logits."""
    strange = names
    if known is not None:
        own = ModelNames(known)
        strange = [name for name in names if own.find(name) is None]
        doubled = [name for name in strange if name in own]
        if doubled:
            return (
                f"classes of the data must be names that one logit of {model} has, got "
                f"{few(doubled)}, which several have; {GIVE_A_MAP}"
            )
    elif logits == CLASSES:
        strange = [name for name in names if imagenet_names().find(name) is None]
    has = "gives no names of them" if known is None else f"calls them {few(known)}"
    return (
        f"classes of the data must be among the {logits} classes of {model}, which {has}, got "
        f"{len(names)}, of which {len(strange)} cannot be matched: {few(strange)}; {GIVE_A_MAP}"
    )


def _check_indices(labels: Tensor | None, logits: int, model: str) -> None:
    if labels is None or not len(labels):
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits:
        shift = (
            f"; they look as if they began at {low}"
            if low != 0 and high - low < logits and low in (-1, 1)
            else ""
        )
        raise DataError(
            f"labels must be indices of the {logits} logits of {model}, 0 … {logits - 1}, got "
            f"{low} … {high}{shift}; {GIVE_A_MAP}"
        )


def _are_unnamed(names: Sequence[str]) -> bool:
    return all(UNNAMED.fullmatch(plain(name).replace(" ", "_")) for name in names)


def _named(
    names: Sequence[str], found: Tensor, logits: int, known: Sequence[str] | None
) -> list[str]:
    """A name for each logit: the model's, or that of the data."""
    if known is not None:
        return list(known)
    by_logit = _numbers(logits)
    for name, logit in zip(names, found.tolist(), strict=True):
        by_logit[logit] = name
    return by_logit


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def few(names: Sequence[str]) -> str:
    """The names, or of many the first three and the last."""
    return ", ".join(names if len(names) <= 5 else [*names[:3], "…", names[-1]])
