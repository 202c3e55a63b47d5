"""The site: pages are listed under their titles; the reference describes every public name once,
and reads a list of fields in a docstring as a list."""

import inspect
import re
import sys
from functools import cache
from importlib import import_module
from typing import NamedTuple

import griffe
import pytest
from documented import ROOT
from import_graph import FLOORS

DOCS = ROOT / "docs"
REFERENCE = [page.read_text() for page in (DOCS / "reference").glob("*.md")]
MODULES = sorted(
    name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)
)
NAMES = r"[a-z_]\w*(?:, [a-z_]\w*)*"
A_FIELD = re.compile(rf"(?:^|\n|[.;] +)({NAMES})(?: \([^)]*\))?:\s")


def from_docs(name):
    sys.path.insert(0, str(DOCS))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(DOCS))


@pytest.fixture(scope="module")
def field_lists():
    return from_docs("field_lists")


@pytest.fixture(scope="module")
def public():
    """Module → the names that it hands out."""
    return from_docs("missing_names").handed_out()


@pytest.fixture(scope="module")
def described(public, tmp_path_factory):
    """Path of each public name → what its page shows."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "ironmoe").mkdir()
    for floor in FLOORS:
        (folder / "ironmoe" / floor).symlink_to(ROOT / floor)

    extensions = griffe.load_extensions(from_docs("public_names").PublicNames)
    package = griffe.load(
        "ironmoe", search_paths=[folder], extensions=extensions, try_relative_path=False
    )
    return {
        f"{module}.{name}": package[module.removeprefix("ironmoe.")].members[name]
        for module, names in public.items()
        for name in names
    }


def things_of(module):
    """Name → what a module hands out; where it has no ``__all__``, what it defines."""
    things = vars(module)
    own = [
        name
        for name, thing in things.items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]
    return {name: things[name] for name in things.get("__all__", own)}


@cache
def shown():
    """Path → class or function, of what the pages show and what has a docstring."""
    found = {}
    for module in MODULES:
        for name, thing in things_of(import_module(module)).items():
            found[f"{module}.{name}"] = thing
            members = vars(thing).items() if inspect.isclass(thing) else ()
            found |= {
                f"{module}.{name}.{member}": getattr(value, "__func__", value)
                for member, value in members
                if not member.startswith("_")
            }
    return {
        path: thing
        for path, thing in found.items()
        if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__doc__
    }


def names_of(thing):
    """The arguments of a function; of a class, its members too."""
    if inspect.isfunction(thing):
        return set(inspect.signature(thing).parameters)
    fields = getattr(thing, "__annotations__", ())
    return {*vars(thing), *fields, *inspect.signature(thing.__init__).parameters}


def sections(field_lists, text, *, fields, names=()):
    read = field_lists.with_lists(inspect.cleandoc(text), fields, names)
    return griffe.parse_google(griffe.Docstring(read), warnings=False)


def listed(section):
    return {item.name: item.description for item in section.value}


def prose_of(section):
    """Where a run of fields would be overlooked."""
    if section.kind.value == "text":
        return [section.value]
    described = section.kind.value in ("parameters", "attributes", "raises", "returns", "yields")
    return [item.description for item in section.value] if described else []


def run_together(field_lists, thing):
    """What the pages would show as prose, or in a box, of the fields in a docstring."""
    names = names_of(thing)
    fields = field_lists.ATTRIBUTES if inspect.isclass(thing) else field_lists.ARGUMENTS
    read = sections(field_lists, thing.__doc__, fields=fields, names=names)
    boxes = [section.title for section in read if section.kind.value == "admonition"]
    runs = [run for part in read for text in prose_of(part) for run in A_FIELD.findall(text)]
    # Griffe takes "low, high" under this heading for a name and a type.
    typed = [item.name for part in read if part.kind.value == "attributes" for item in part.value]
    return [
        *boxes,
        *(run for run in runs if names.issuperset(run.split(", "))),
        *(name for name in typed if name.endswith(",")),
    ]


def test_a_page_has_its_own_title_in_the_list_of_pages():
    named = re.findall(r"^ +- (.+): (\S+\.md)$", (DOCS / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) > 20
    titles = {page: (ROOT / page).read_text().partition("\n")[0] for _, page in named}
    assert titles == {page: f"# {name}" for name, page in named} | {"README.md": "# ironmoe"}


def test_the_site_takes_what_is_tested_here():
    assert "extensions: [field_lists.py, public_names.py]" in (DOCS / "mkdocs.yml").read_text()


def test_a_module_that_hands_out_names_has_its_place_in_the_reference_under_its_own_name(public):
    assert len(public) > 10
    assert [module for module in public if module not in MODULES] == []
    headed = [
        name
        for page in REFERENCE
        for name, shown in re.findall(r"^##? (\S+)$[^#]*?^::: (\S+)$", page, re.MULTILINE)
        if name == shown
    ]
    assert sorted(headed) == MODULES


def test_the_reference_describes_every_public_name(described):
    """Constants, too, and functions whose file has the same name."""
    assert len(described) > 250
    assert [path for path, thing in described.items() if thing.is_module] == []
    assert [path for path, thing in described.items() if not thing.has_docstrings] == []
    assert described["ironmoe.kernels.expert_mlp"].parameters["w_in"]
    assert described["ironmoe.attacks.smoothness.Stability"].parameters["farthest"]


def test_what_several_modules_hand_out_is_described_in_one_of_them(described):
    def imported(path):
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)

    links = {
        path: re.fullmatch(r"The same as \[`(.+)`\]\[\1\], .*", thing.docstring.value)
        for path, thing in described.items()
    }
    links = {path: link[1] for path, link in links.items() if link}
    assert links["ironmoe.moe.Routing"] == "ironmoe.kernels.Routing"
    assert links["ironmoe.moe.routing_iou"] == "ironmoe.moe.metrics.routing_iou"
    assert links["ironmoe.attacks.certify"] == "ironmoe.attacks.certificates.certify"
    assert all(imported(path) is imported(place) for path, place in links.items())
    homes = [thing.canonical_path for path, thing in described.items() if path not in links]
    assert len(homes) == len(set(homes)) == len(described) - len(links)
    assert not links.keys() & set(links.values())


def test_a_public_name_that_the_site_lacks_is_found(described):
    """``make docs`` looks for headings: anchors stand on the pages of other modules, too."""
    missing = from_docs("missing_names").missing
    headings = {path: f'<h2 id="{path}" class="doc doc-heading">' for path in described}
    examples = {"ironmoe.bench.models.load.load_model", "ironmoe.bench.models.overrides.Overrides"}
    assert set(missing(list(headings.values()))) == examples
    headings["ironmoe.moe.MoE"] = '<a id="ironmoe.moe.MoE"></a>'
    assert set(missing(list(headings.values()))) == examples | {"ironmoe.moe.MoE"}
    assert "\t$(BIN)/python docs/missing_names.py build/docs\n" in (ROOT / "Makefile").read_text()


def test_no_docstring_of_the_reference_runs_its_fields_together(field_lists):
    assert len(shown()) > 400
    together = {path: run_together(field_lists, thing) for path, thing in shown().items()}
    assert {path: runs for path, runs in together.items() if runs} == {}


def test_fields_that_run_together_would_be_found(field_lists):
    class Fields(NamedTuple):
        """Two numbers.
        one: the first
        two: the second
        """

        one: int
        two: int

    assert run_together(field_lists, Fields) == ["one", "two"]
    Fields.__doc__ = "Two numbers.\n\nHere\n\none: the first. two: the second"
    assert run_together(field_lists, Fields) == ["two"]
    Fields.__doc__ = "Two numbers.\n\nHere they are.\none:\n    the first"
    assert run_together(field_lists, Fields) == ["one"]
    Fields.__doc__ = "Two numbers.\n\nONE: the first\n    of two"
    assert run_together(field_lists, Fields) == ["the first"]


def test_a_list_without_a_heading_keeps_every_name_and_every_line(field_lists):
    text = """What an attack did.

    adversarial:   (N, …); the clean image where it was
                   misclassified already
    low, high:     the bounds

    steps: how many

    What comes after it: prose.
    """
    summary, fields, after = sections(field_lists, text, fields=field_lists.ATTRIBUTES)
    assert summary.value == "What an attack did."
    assert fields.title == "Attributes:"
    assert {name: " ".join(text.split()) for name, text in listed(fields).items()} == {
        "adversarial": "(N, …); the clean image where it was misclassified already",
        "low, high": "the bounds",
        "steps": "how many",
    }
    assert after.value == "What comes after it: prose."


def test_errors_without_a_heading_are_errors(field_lists):
    text = "Does it.\n\nn: how often\n\nValueError, TypeError: it is\n    none.\nOSError: no file."
    _, arguments, errors = sections(field_lists, text, fields=field_lists.ARGUMENTS)
    assert listed(arguments) == {"n": "how often"}
    assert [str(error.annotation) for error in errors.value] == ["ValueError, TypeError", "OSError"]


def test_a_remark_in_the_heading_becomes_the_title_of_the_list(field_lists):
    text = "PGD.\n\nArgs (beyond those of ``Attack``):\n    steps: how many\n        there are"
    _, arguments = sections(field_lists, text, fields=field_lists.ATTRIBUTES)
    assert arguments.title == "Parameters (beyond those of Attack):"
    assert list(listed(arguments)) == ["steps"]


def test_fields_on_one_line_are_parted_where_they_are_names_of_the_thing(field_lists):
    text = "MoE; dim: D.\n\nArgs:\n    dim: D; low,\n        high: of x; empty: none; k:\n        K"
    names = {"dim", "low", "high", "k"}
    summary, arguments = sections(field_lists, text, fields=field_lists.ARGUMENTS, names=names)
    assert summary.value == "MoE; dim: D."
    assert list(listed(arguments)) == ["dim", "k"]
    spaced = text.replace(",\n        ", ", ")
    _, arguments = sections(field_lists, spaced, fields=field_lists.ARGUMENTS, names=names)
    assert listed(arguments) == {"dim": "D", "low, high": "of x; empty: none", "k": "\nK"}


def test_prose_is_no_list(field_lists):
    text = "bool: whether.\n\nIt is so\nin a batch: always.\n\nmode: is\nnot indented."
    (prose,) = sections(field_lists, text, fields=field_lists.ARGUMENTS, names={"batch"})
    assert prose.value == text
