"""Whether the site describes every public name: ``python docs/missing_names.py build/docs``.

Public is what stands in the ``__all__`` of a room or of a file that lies directly on a floor, and
what an example of the documentation imports.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "moe", "attacks", "bench")
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
# An anchor alone is not enough: a name has one on the page of another module that hands it out.
HEADING = re.compile(r'<h\d id="(ironmoe\.[\w.]+)"')


def handed_out(root: Path = ROOT) -> dict[str, list[str]]:
    """Public module → the names of its ``__all__``."""
    found = {}
    for floor in FLOORS:
        for file in sorted({*(root / floor).glob("*.py"), *(root / floor).rglob("__init__.py")}):
            names = _all_of(file.read_text())
            if names:
                parts = ("ironmoe", *file.relative_to(root).with_suffix("").parts)
                found[".".join(parts).removesuffix(".__init__")] = names
    return found


def _all_of(code: str) -> list[str]:
    for line in ast.parse(code).body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return list(ast.literal_eval(line.value))
    return []


def imported(page: str) -> set[str]:
    """The path of each name that the examples of a page import from a module of ironmoe."""
    lines = [line for code in EXAMPLE.findall(page) for line in ast.walk(ast.parse(code))]
    return {
        f"{line.module}.{alias.name}"
        for line in lines
        if isinstance(line, ast.ImportFrom) and str(line.module).startswith("ironmoe.")
        for alias in line.names
    }


def missing(pages: list[str], root: Path = ROOT) -> list[str]:
    """The public names over which no page, which is HTML, has a heading."""
    modules = handed_out(root)
    public = {f"{module}.{name}" for module, names in modules.items() for name in names}
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        public |= imported(page.read_text())
    described = {name for page in pages for name in HEADING.findall(page)}
    return sorted(public - described - modules.keys())


if __name__ == "__main__":
    reference = Path(sys.argv[1], "docs", "reference").glob("*.html")
    lacking = missing([page.read_text() for page in reference])
    for name in lacking:
        print(f"{name} is not in the reference: it needs a docstring, its module a page")
    sys.exit(bool(lacking))
