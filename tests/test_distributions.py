"""What a wheel and an sdist hold. ``make dist`` installs them and runs the command."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from import_graph import FLOORS, ROOT

NOT_INSTALLED = "bench/results/"  # measured rows, which need no installation
BUILD = "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')"


class Built(NamedTuple):
    """The files inside, by their paths in the checkout. Of a wheel only those under ironmoe."""

    wheel: set[str]
    sdist: set[str]
    metadata: str


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What git would commit, by its path."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs a git checkout")
    return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tracked, tmp_path_factory) -> Built:
    """Both are built in a copy, because setuptools writes beside what it builds."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("checkout")
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    with zipfile.ZipFile(next((folder / "out").glob("*.whl"))) as archive:
        wheel = archive.namelist()
        (metadata,) = (name for name in wheel if name.endswith("dist-info/METADATA"))
        text = archive.read(metadata).decode()
    with tarfile.open(next((folder / "out").glob("*.tar.gz"))) as archive:
        sdist = {member.name.partition("/")[2] for member in archive if member.isfile()}
    installed = {name.partition("/")[2] for name in wheel if name.startswith("ironmoe/")}
    return Built(installed, sdist, text)


def test_a_wheel_holds_every_file_of_the_floors_and_nothing_else(built, tracked):
    """A template that is not in the wheel is missed only by those who have no checkout."""
    ours = {
        name
        for name in tracked
        if name.partition("/")[0] in FLOORS and not name.startswith(NOT_INSTALLED)
    }
    assert built.wheel == ours
    assert {Path(name).suffix for name in ours} >= {".py", ".jinja", ".typed", ".tsv", ".xz"}


def test_an_sdist_holds_tests_pages_and_licence(built, tracked):
    """Everything but what serves the repository itself, whose name begins with a dot."""
    wanted = {name for name in tracked if not name.startswith(".")}
    assert wanted - built.sdist == set()
    assert {"LICENSE", "MANIFEST.in", "tests/conftest.py", "docs/attacks.md"} <= built.sdist
    assert not any(name.endswith(".pyc") for name in built.sdist)


def test_the_metadata_names_licence_page_and_every_extra(built):
    assert "License-Expression: Apache-2.0" in built.metadata
    assert "Description-Content-Type: text/markdown" in built.metadata
    extras = [
        line.partition(": ")[2]
        for line in built.metadata.splitlines()
        if line.startswith("Provides-Extra: ")
    ]
    assert {"bench", "dev", "hf", "jax"} <= set(extras)
