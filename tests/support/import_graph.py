"""Who imports whom in the four floors, read from the source without importing anything.

An import inside a function or under TYPE_CHECKING counts like any other: it is an arrow that a
reader follows.
"""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "moe", "attacks", "bench")  # from below

Arrows = Mapping[str, set[str]]


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name → file, of every module and package of the floors."""
    found = {}
    for floor in FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            parts = ("ironmoe", *path.relative_to(root).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(known: Mapping[str, Path]) -> dict[str, set[str]]:
    """Module → the modules it imports. A name taken out of a package is an arrow to the package,
    a submodule taken out of it is one to the submodule."""
    found: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            found[name] |= {target for target in _targets(node, known) if target != name}
    return found


def _targets(node: ast.AST, known: Mapping[str, Path]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & known.keys()
    if not isinstance(node, ast.ImportFrom) or node.module not in known:
        return set()
    submodules = (f"{node.module}.{alias.name}" for alias in node.names)
    return {name if name in known else str(node.module) for name in submodules}


def circles(of: Arrows) -> list[list[str]]:
    """Groups of names that reach each other: Tarjan's strongly connected components of two or more
    (SIAM Journal on Computing 1, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_names: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        open_names.append(name)

        for target in sorted(of.get(name, ())):
            if target not in index:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in open_names:
                lowest[name] = min(lowest[name], index[target])

        if lowest[name] == index[name]:
            start = open_names.index(name)
            group = open_names[start:]
            del open_names[start:]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(of):
        if name not in index:
            visit(name)
    return found


def children(folder: str, of: Arrows) -> dict[str, set[str]]:
    """The files and rooms of a folder as the names of one graph: what lies deeper counts as its
    room. The folder's own ``__init__``, which hands out names, is left out."""
    found: dict[str, set[str]] = {}
    for source, targets in of.items():
        here = _child(folder, source)
        if here is not None:
            there = {child for target in targets if (child := _child(folder, target))}
            found.setdefault(here, set()).update(there - {here})
    return found


def _child(folder: str, name: str) -> str | None:
    inside = name.removeprefix(f"{folder}.")
    return None if inside == name else inside.partition(".")[0]


def files_a_room(known: Iterable[Path]) -> dict[Path, int]:
    """Folder → how many files it holds, without its ``__init__``."""
    counts: dict[Path, int] = {}
    for path in known:
        counts[path.parent] = counts.get(path.parent, 0) + (path.name != "__init__.py")
    return counts
