"""The examples of the documentation: they run, and what they print means something."""

import re
from importlib import import_module

import documented
import pytest
import torch
from documented import EXAMPLES, PAGES, ROOT

from ironmoe.attacks import registry

OPTIONAL = ("timm", "transformers", "msgpack", "peft", "lightning", "pyarrow", "datasets")
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
    assert counts["README.md"] == 8
    assert all(counts[f"docs/{page}.md"] for page in PAGES_WITH_EXAMPLES)


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_an_example_runs_and_its_attacks_do_something(page, code, monkeypatch):
    """Numbers differ from processor to processor; what is asserted are differences of many
    images."""
    variables = run(page, code, monkeypatch)
    if "report" in variables:
        check_report(variables["report"])
    if page == "docs/attacks.md":
        check_attacks(variables)
    if "robust" in variables:
        assert variables["robust"].worst_case.value > 2 / 4  # of 4 classes
    if "adversarial" in variables:
        images, adversarial = (variables[name].double() for name in ("images", "adversarial"))
        # a gradient of 0 would have left the images where they were
        assert (adversarial - images).abs().mean() > 1e-3


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


@pytest.mark.parametrize("page", PAGES)
def test_files_it_points_to_exist(page):
    file = ROOT / page
    prose = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)\s#]+)[^)]*\)", prose):
        assert (file.parent / target).exists(), target
