"""The register of kinds of models: each is one file in ``kinds/``, registered where it is defined.

From here follow the forms of ``--model`` in help and error texts. Nothing here knows a kind by
name.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ironmoe.bench.common.query import read_value
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.moe.checkpoints.errors import CheckpointError

SWITCHES = {"true": True, "false": False}
NO_SWITCHES = {"yes", "no", "on", "off"}


@dataclass(frozen=True)
class Source:
    """What a kind loads from.

    spec: the whole name, as the user wrote it. path: what stands between the prefix and the
    question mark. query: key → text of what follows. device: where the model will be. image_size:
    (height, width) that the data or the user dictates, None if nothing does.
    """

    spec: str
    path: str
    query: dict[str, str]
    device: torch.device
    image_size: tuple[int, int] | None

    def __str__(self) -> str:
        return f"--model {self.spec}"

    def switch(self, key: str) -> bool | None:
        """What ``key=true`` or ``key=false`` of the query says; None where it says nothing.

        Raises:
            CheckpointError: it has another value.
        """
        text = self.query.get(key)
        if text is None:
            return None
        if text.lower() not in SWITCHES:
            raise CheckpointError(f"{self} must have {key}=true or {key}=false, got {text!r}")
        return SWITCHES[text.lower()]

    @property
    def arguments(self) -> dict[str, Any]:
        """The query as keyword arguments of a library that has switches among them, to which any
        text would mean true.

        Raises:
            CheckpointError: a value is a word for true or false, but not one of these two.
        """
        for key, text in self.query.items():
            if text.lower() in NO_SWITCHES:
                self.switch(key)
        return {key: read_value(text) for key, text in self.query.items()}


Loader = Callable[[Source], LoadedModel]


class Kind(NamedTuple):
    """form: as a user writes it; load: the loader; is_path: whether the name is a path, which
    counts as the same from every folder."""

    form: str
    load: Loader
    is_path: bool = False


KINDS: dict[str, Kind] = {}
"""prefix → kind: ``prefix:…``."""

FILE_KINDS: dict[str, Kind] = {}
"""suffix, with its dot and in small letters → kind: a path that ends so, in any letters."""


def register_kind(*prefixes: str, form: str, is_path: bool = False) -> Callable[[Loader], Loader]:
    """Register the loader of ``prefix:…``."""

    def register(load: Loader) -> Loader:
        KINDS.update({prefix: Kind(form, load, is_path) for prefix in prefixes})
        return load

    return register


def register_files(*suffixes: str, form: str) -> Callable[[Loader], Loader]:
    """Register the loader of files whose names end so."""

    def register(load: Loader) -> Loader:
        FILE_KINDS.update({suffix: Kind(form, load, is_path=True) for suffix in suffixes})
        return load

    return register


def file_kind(path: str | Path) -> Kind | None:
    """The kind of a file, by how its name ends; None if no file ends so."""
    return FILE_KINDS.get(Path(path).suffix.lower())


def forms() -> str:
    """One line with every form, for help and error texts."""
    names = [kind.form for kind in (*KINDS.values(), *FILE_KINDS.values())]
    return ", ".join(dict.fromkeys(names))
