"""What the reference pages show of a module: the names of its ``__all__``, each described once.

Griffe keeps one thing under a name. Where a function is named like its file, as ``expert_mlp`` is,
it keeps the file, and the page would lack the function. And what two modules hand out, as
``Routing``, would be described twice. It is described in the module that hands out fewer names; the
page of the other one has a link.
"""

import re
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import griffe

Thing = griffe.Object | griffe.Alias
PAGES = Path(__file__).with_name("reference").glob("*.md")
SHOWN = {
    name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
}


class PublicNames(griffe.Extension):
    """Puts what a name means in the place where the pages look for it."""

    def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
        # The whole package, when griffe has given the dataclasses in all files their arguments.
        if mod.parent is not None:
            return

        modules = [module for module in _modules(mod) if module.path in SHOWN]
        modules.sort(key=lambda module: (len(module.exports or ()), module.path))
        things = [
            (module, str(name), _meant(module, str(name)))
            for module in modules
            for name in module.exports or ()
        ]

        described: dict[str, str] = {}
        for module, name, thing in things:
            place = described.setdefault(thing.path, f"{module.path}.{name}")
            if place != f"{module.path}.{name}":
                module.set_member(name, _link(name, thing, place))
            elif thing.parent is not module:
                module.set_member(name, griffe.Alias(name, thing, parent=module))


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for inside in module.members.values():
        if isinstance(inside, griffe.Module):  # an alias is none, and is not resolved yet
            yield from _modules(inside)


def _meant(module: griffe.Module, name: str) -> Thing:
    """What Python finds under the name, however often it was imported."""
    path = module.imports.get(name)
    if path is None:
        return module.members[name]
    parent, _, name = path.rpartition(".")
    return _meant(module.modules_collection[parent], name)


def _link(name: str, thing: Thing, place: str) -> Thing:
    """A thing of the same kind and signature, whose description is a link to the other place."""
    link = griffe.Class(name) if thing.is_class else copy(thing)
    link.docstring = griffe.Docstring(f"The same as [`{place}`][{place}], where it is described.")
    return link
