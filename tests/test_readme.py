"""The examples of the documentation: they run, and what they print means something."""

import re
from importlib import import_module

import documented
import pytest
import torch
from documented import EXAMPLES, PAGES, ROOT

from ironmoe.attacks import registry

OPTIONAL = ("timm", "transformers", "msgpack", "peft", "lightning", "pyarrow", "datasets")
TUTORIALS = ("first-attack", "own-layer", "own-model")
FIRST_PAGES = ("README.md", *(f"docs/tutorials/{name}.md" for name in TUTORIALS))
PAGES_WITH_EXAMPLES = (
    "adapters",
    "attacks",
    "certificates",
    "data",
    "imagenet",
    "models",
    "routers",
    "routing",
    "smoothness",
    "training",
    *(f"tutorials/{name}" for name in TUTORIALS),
)
# What an example needs without naming it.
UNSAID = {"read_vmoe_checkpoint": "msgpack", "TrainingArguments": "accelerate"}
# What makes the example of the CUDA graph one for a CPU.
SMALLER = {"2048, 768, 128, 8": "32, 24, 4, 2", "4096, 2048": "50, 32", '"cuda"': '"cpu"'}


def run(page, code, monkeypatch):
    """The example's variables, or a skip where it needs something that is not here."""
    needed = [name for name in OPTIONAL if re.search(rf"^(from|import) {name}", code, re.MULTILINE)]
    for name in needed + [name for word, name in UNSAID.items() if word in code]:
        try:
            import_module(name)
        # timm beside a torchvision of another build raises RuntimeError
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"needs {name}: {error}")
    if "cuda" in code and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.chdir(ROOT)
    # What an example registers is gone with it.
    monkeypatch.setattr(registry, "ATTACKS", dict(registry.ATTACKS))
    variables = {}
    exec(compile(code, page, "exec"), variables)
    return variables


def test_every_page_for_users_has_examples():
    counts = {page: sum(example.values[0] == page for example in EXAMPLES) for page in PAGES}
    assert counts["README.md"] == 4
    assert all(counts[f"docs/{page}.md"] for page in PAGES_WITH_EXAMPLES)


@pytest.mark.parametrize(("page", "code", "output"), EXAMPLES)
def test_an_example_runs_and_its_attacks_do_something(page, code, output, monkeypatch, capsys):
    """Numbers differ from processor to processor; what is asserted are differences of many
    images, and the output where it stands under the example."""
    variables = run(page, code, monkeypatch)
    if output:
        sample = len(variables["labels"]) if "report" in variables else 100
        assert documented.differences(output, capsys.readouterr().out, sample) == []
    elif "report" in variables:
        check_report(variables["report"])
    if page == "docs/attacks.md":
        check_attacks(variables)
    if "robust" in variables:
        assert variables["robust"].worst_case.value > 2 / 4  # of 4 classes
    if "adversarial" in variables:
        images, adversarial = (variables[name].double() for name in ("images", "adversarial"))
        # a gradient of 0 would have left the images where they were
        assert (adversarial - images).abs().mean() > 1e-3


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/tutorials/{name}.md" for name in TUTORIALS)]
)
def test_what_a_first_reader_runs_shows_its_output(page):
    """All that print; a file that another program imports prints nothing."""
    examples = [example.values for example in EXAMPLES if example.values[0] == page]
    assert examples
    assert [code for _, code, output in examples if ("print(" in code) != bool(output)] == []


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("42 of 95 images fall, 47.0 % [37.5, 56.7]", True),
        ("44 of 93 images fall, 49.0 % [39.5, 58.6]", True),
        ("45 of 95 images fall, 47.0 % [37.5, 56.7]", False),
        ("42 of 95 images fall, 52.0 % [42.3, 61.5]", False),
        ("42 of 95 images hold, 47.0 % [37.5, 56.7]", False),
        ("42 of 95 images fall", False),
        ("", False),
    ],
)
def test_outputs_are_the_same_up_to_two_images(printed, same):
    text = "42 of 95 images fall, 47.0 % [37.5, 56.7]"
    assert (documented.differences(text, printed) == []) is same


def test_the_step_of_the_cuda_graph_moves_inside_the_ball():
    """A GPU runs the whole example: tests/device."""
    code = documented.cuda_graph_example().split("# The first launches")[0]
    for size, smaller in SMALLER.items():
        assert size in code
        code = code.replace(size, smaller)
    variables = {}
    exec(compile(code, "docs/kernels.md", "exec"), variables)

    start = variables["point"].clone()
    for _ in range(2):
        variables["step"]()
    documented.check_point(variables, start, moved_by=4 / 255)


def check_report(report):
    """The model has learnt its task, falls further at a larger radius, and nothing looks like false
    security."""
    chance = 1 / 10
    for summary in report.attacks.values():
        shares = [
            report.clean_accuracy.value,
            *(summary.curve[eps].value for eps in sorted(summary.curve)),
        ]
        assert shares[0] > 5 * chance
        assert shares == sorted(shares, reverse=True) and shares[-1] < shares[0] - 0.5
    assert [flag.message for flag in report.checks if flag.tripped] == []


def check_attacks(variables):
    """Most images fall at 8/255, and the mates push every victim towards another class, some of
    them far."""
    result = variables["result"]
    assert result.clean_correct.double().mean() > 0.8 and result.success.double().mean() > 0.3
    if "mates" in variables:
        before, after = variables["mates"].margin_before, variables["mates"].margin
        assert (after <= before).all() and (after < before).any()


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_files_and_headings_it_points_to_exist(page):
    """``make docs`` checks the same on the site."""
    file = ROOT / page
    prose = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(), flags=re.DOTALL)
    for target, heading in re.findall(r"\]\((?!http)([^)\s#]*)(?:#([^)\s]+))?\)", prose):
        there = file.parent / target if target else file
        assert there.exists(), target
        if heading:
            assert heading in headings(there), f"{target}#{heading}"


def headings(page):
    """The names that GitHub, and the site, give to the headings of a page."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
