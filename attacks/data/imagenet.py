"""The 1,000 classes of ImageNet (ILSVRC 2012) in the order of the usual models' logits, and how a
name finds its class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("imagenet_classes.tsv")
CLASSES = 1000
ALIKE = 0.95  # of a model's names: so many are synonyms of the class in the standard order


class ImageNetClass(NamedTuple):
    """wnid: WordNet's id, the name of a folder of ImageNet; synonyms: what it is called."""

    wnid: str
    synonyms: tuple[str, ...]


@cache
def imagenet_classes() -> tuple[ImageNetClass, ...]:
    """The classes by index of the logits."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return tuple(ImageNetClass(wnid, tuple(names.split(", "))) for wnid, names in rows)


class NameIndex:
    """The number of a name: of one that is written so, else of the only one that differs from it in
    nothing but capital letters, underscores and further spaces.

    exact, alike: name, or ``plain`` name, → its number; None where two have it.
    """

    def __init__(self, pairs: Iterable[tuple[str, int]]) -> None:
        self.exact: dict[str, int | None] = {}
        self.alike: dict[str, int | None] = {}
        for name, number in pairs:
            for table, key in ((self.exact, name), (self.alike, plain(name))):
                table[key] = number if table.get(key, number) == number else None

    def __contains__(self, name: str) -> bool:
        return plain(name) in self.alike

    def find(self, name: str) -> int | None:
        """None: nothing has this name, or two numbers have it, as "crane" is a bird and a
        machine."""
        return self.exact[name] if name in self.exact else self.alike.get(plain(name))


@cache
def imagenet_names() -> NameIndex:
    """Indices of the logits by WordNet ids, by synonyms, and by all synonyms of a class as one
    name."""
    return NameIndex(
        (name, index)
        for index, (wnid, synonyms) in enumerate(imagenet_classes())
        for name in dict.fromkeys((wnid, ", ".join(synonyms), *synonyms))
    )


def are_imagenet(names: Sequence[str]) -> bool:
    """Whether these are names of ImageNet's classes in the standard order, as transformers and
    torchvision write them, nearly all at least."""
    if len(names) != CLASSES:
        return False
    right = 0
    for name, (wnid, synonyms) in zip(names, imagenet_classes(), strict=True):
        known = {plain(each) for each in (wnid, ", ".join(synonyms), *synonyms)}
        right += plain(name) in known or plain(name.split(",")[0]) in known
    return right >= ALIKE * CLASSES


class ModelNames:
    """The logits of a model by the names of its classes: a whole name before one of the synonyms
    that it lists, and that before another name of the same class of ImageNet."""

    def __init__(self, names: Sequence[str]) -> None:
        self._whole = NameIndex((name, index) for index, name in enumerate(names))
        self._parts = NameIndex(
            (part, index) for index, name in enumerate(names) for part in name.split(", ")
        )
        standard = imagenet_names()
        by_class: dict[int | None, int | None] = {}
        for index, name in enumerate(names):
            place = standard.find(name)
            place = standard.find(name.split(", ")[0]) if place is None else place
            by_class[place] = index if by_class.get(place, index) == index else None
        self._by_class = by_class

    def __contains__(self, name: str) -> bool:
        """Whether one logit or several may be meant."""
        return name in self._whole or name in self._parts or self._by_standard(name) is not None

    def find(self, name: str) -> int | None:
        """The index of the logit; None: no class has this name, or several have it."""
        both, like = (self._whole, self._parts), plain(name)
        tables = [(index.exact, name) for index in both] + [(index.alike, like) for index in both]
        for table, key in tables:
            if key in table:
                return table[key]
        return self._by_standard(name)

    def _by_standard(self, name: str) -> int | None:
        place = imagenet_names().find(name)
        return None if place is None else self._by_class.get(place)


def plain(name: str) -> str:
    """A name without what writers differ in: capital letters, underscores, further spaces."""
    return " ".join(name.replace("_", " ").casefold().split())
