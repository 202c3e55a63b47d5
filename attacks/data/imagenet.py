"""The 1,000 classes of ImageNet (ILSVRC 2012) in the order of the usual models' logits."""

from __future__ import annotations

from collections.abc import Sequence
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


@cache
def imagenet_names() -> dict[str, int | None]:
    """Name → index of the logit: WordNet ids, synonyms, and all synonyms of a class as one name.
    None for a name that two classes have, such as "crane"."""
    names: dict[str, int | None] = {}
    for index, (wnid, synonyms) in enumerate(imagenet_classes()):
        for name in dict.fromkeys((wnid, ", ".join(synonyms), *synonyms)):
            names[plain(name)] = None if plain(name) in names else index
    return names


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


def plain(name: str) -> str:
    """A name without what writers differ in: capital letters, underscores, further spaces."""
    return " ".join(name.replace("_", " ").casefold().split())
