"""Libraries that may be missing or broken where tests run, and small ones in their place."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest


def library(name: str) -> Any:
    """The module, or a skip. A torchvision of another torch raises RuntimeError or OSError."""
    try:
        return import_module(name)
    except Exception as error:
        pytest.skip(f"needs {name}: {error}")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    """A module with this content, under ``name`` until the test ends."""
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    parent, _, child = name.rpartition(".")
    if parent:
        monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
    return module
