"""The house: four floors, rooms of a few files, imports that go down only."""

import re
from functools import cache
from pathlib import Path

import import_graph
import pytest
from import_graph import FLOORS, ROOT

MODULES = import_graph.modules()
FILES = {name for name, path in MODULES.items() if path.name != "__init__.py"}
PACKAGES = sorted(MODULES.keys() - FILES)
MOST_FILES, MOST_LINES = 16, 350


@cache
def all_arrows():
    """Reading every import takes seconds, which collecting tests need not take."""
    return import_graph.arrows(MODULES)


def floor(name):
    return name.split(".")[1]


@pytest.mark.parametrize("number", range(len(FLOORS)))
def test_a_floor_imports_only_from_floors_below(number):
    below = FLOORS[: number + 1]
    mine = {
        name: targets for name, targets in all_arrows().items() if floor(name) == FLOORS[number]
    }
    upwards = [
        (name, to) for name, targets in mine.items() for to in targets if floor(to) not in below
    ]
    assert mine and upwards == []


@pytest.mark.parametrize("name", FLOORS)
def test_files_of_a_floor_import_each_other_in_no_circle(name):
    mine = {file: all_arrows()[file] & FILES for file in FILES if floor(file) == name}
    assert import_graph.circles(mine) == []


def test_a_file_takes_nothing_from_the_names_that_its_own_floor_hands_out():
    """They import the file: that is a circle which Python happens to allow."""
    inwards = [name for name in FILES if f"ironmoe.{floor(name)}" in all_arrows()[name]]
    assert inwards == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_files_and_rooms_of_a_folder_import_each_other_in_no_circle(folder):
    assert import_graph.circles(import_graph.children(folder, all_arrows())) == []


def test_a_circle_is_found_among_files_and_among_rooms():
    files = {"a.one.x": {"a.two.y"}, "a.two.y": set(), "a.two.z": {"a.one.x"}, "a.w": {"a.two.z"}}
    assert import_graph.circles(files) == []
    assert import_graph.circles(import_graph.children("a", files)) == [["one", "two"]]
    files["a.two.y"] = {"a.two.z"}
    assert import_graph.circles(files) == [["a.one.x", "a.two.y", "a.two.z"]]


def test_the_import_graph_sees_every_form_of_an_import(tmp_path):
    lines = {
        "kernels/__init__.py": "",
        "kernels/one.py": "NUMBER = 1",
        "kernels/two.py": "from ironmoe.kernels import one\nimport ironmoe.kernels.three",
        "kernels/three.py": "def late():\n    from ironmoe.kernels.one import NUMBER",
        "moe/four.py": "from ironmoe.kernels import missing\nimport torch",
    }
    for name, text in lines.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = import_graph.arrows(import_graph.modules(tmp_path))
    assert found == {
        "ironmoe.kernels": set(),
        "ironmoe.kernels.one": set(),
        "ironmoe.kernels.two": {"ironmoe.kernels.one", "ironmoe.kernels.three"},
        "ironmoe.kernels.three": {"ironmoe.kernels.one"},
        "ironmoe.moe.four": {"ironmoe.kernels"},
    }


def test_every_folder_with_code_is_a_package_that_is_installed():
    folders = {path.parent for path in MODULES.values()}
    assert all((folder / "__init__.py").exists() for folder in folders)
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    assert sorted(re.findall(r'"([\w.]+)"', listed[1])) == PACKAGES


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_room_holds_few_files(folder):
    assert import_graph.files_a_room(MODULES.values())[MODULES[folder].parent] <= MOST_FILES


def test_no_file_holds_more_than_one_idea():
    lengths = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_docstring_of_a_room_says_what_it_is():
    empty = [name for name in PACKAGES if not Path(MODULES[name]).read_text().startswith('"""')]
    assert empty == []


def test_the_architecture_page_names_every_room_and_no_file_that_is_gone():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {str(MODULES[name].parent.relative_to(ROOT)) for name in PACKAGES}
    for room in sorted(rooms):
        floor_name, _, inside = room.partition("/")
        section = page.partition(f"\n## {floor_name}/")[2].partition("\n## ")[0]
        assert f"{inside.rpartition('/')[2]}/" in section if inside else section, room

    folders = (*FLOORS, "tests")
    files = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", page):
        assert any(file.endswith(f"/{name}") for file in files), name


def test_no_line_of_code_is_longer_than_100_columns():
    """ruff lets lines pass that end in a comment for another tool."""
    files = [path for folder in (*FLOORS, "tests") for path in (ROOT / folder).rglob("*.py")]
    lines = [(path, line) for path in files for line in path.read_text().splitlines()]
    assert [(str(path), line) for path, line in lines if len(line) > 100] == []
