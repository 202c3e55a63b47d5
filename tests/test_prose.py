"""The prose of README, docs and CONTRIBUTING: its width, and that what it names exists."""

import re

import pytest
from documented import PAGES, ROOT

WIDTH, CODE_WIDTH = 100, 80
FIRST_PAGES = [page for page in PAGES if page == "README.md" or "/tutorials/" in page]
LINK = r"!?\[[^\]]*\]\([^)]*\)"
REPORT = "docs/compile-report.md"  # written by a program
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = GUIDE.partition("\n## A new thing is one file")[2].partition("\n## ")[0]
_, _, *ROWS = [line for line in RECIPES.splitlines() if line.startswith("|")]  # without the head


def prose(text):
    """(number, line) of each line that is neither code nor a row of a table."""
    inside_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside_code = not inside_code
        elif not inside_code and not line.startswith("|"):
            yield number, line


@pytest.mark.parametrize("page", [page for page in [*PAGES, "CONTRIBUTING.md"] if page != REPORT])
def test_prose_ends_at_100_columns(page):
    lines = prose((ROOT / page).read_text())
    long = [number for number, line in lines if len(line) > WIDTH and not re.search(LINK, line)]
    assert not long, f"lines {long} of {page} are longer than {WIDTH} columns"


@pytest.mark.parametrize("page", FIRST_PAGES)
def test_code_of_the_first_pages_can_be_seen_whole_in_a_window_of_1280_pixels(page):
    """There the site has room for 82 columns of code beside its two lists."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    assert [line for line in code.splitlines() if len(line) > CODE_WIDTH] == []


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_named_by_their_whole_path_exist(page):
    whole = r"`((?:kernels|moe|attacks|bench|tests|docs)/[\w/]+\.\w+)`"
    for path in re.findall(whole, (ROOT / page).read_text()):
        assert (ROOT / path).exists(), path


def test_every_recipe_names_files_that_exist():
    assert ROWS
    for row in ROWS:
        paths = re.findall(r"`([\w/]+(?:/|\.py|\.md))`", row)
        assert paths, row
        for path in paths:
            assert (ROOT / path).exists(), path


def test_every_recipe_names_things_that_its_files_define():
    for row in ROWS:
        files = [ROOT / path for path in re.findall(r"`([\w/]+\.py)`", row)]
        names = re.findall(r"`@?([A-Za-z_]+)`", row)
        folders = [ROOT / path for path in re.findall(r"`((?:kernels|moe|attacks)/[\w/]*/)`", row)]
        files += [file for folder in folders for file in folder.parent.rglob("*.py")]
        text = "\n".join(file.read_text() for file in files)
        for name in names:
            assert re.search(rf"\b{name}\b", text), f"{name}: {row}"


def test_the_makefile_lists_every_target_that_the_guide_names():
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"`make ([a-z-]+)`", GUIDE)
    assert named and set(named) <= set(targets)
