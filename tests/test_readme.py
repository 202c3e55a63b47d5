import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/adapters.md", "docs/attacks.md", "docs/routers.md", "docs/routing.md"]
EXAMPLES = [(page, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]
OPTIONAL = ("timm", "transformers", "msgpack")


def test_every_page_has_examples():
    assert {page for page, _ in EXAMPLES} == set(PAGES)
    assert sum(page == "README.md" for page, _ in EXAMPLES) == 7


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_examples_run(page, code, monkeypatch):
    needed = [name for name in OPTIONAL if re.search(rf"^(from|import) {name}", code, re.MULTILINE)]
    for name in needed + (["msgpack"] if "read_vmoe_checkpoint" in code else []):
        try:
            import_module(name)
        except (ImportError, RuntimeError) as error:  # timm beside a torchvision of another build raises RuntimeError
            pytest.skip(f"needs {name}: {error}")
    monkeypatch.chdir(ROOT)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, "docs/architecture.md", "docs/kernels.md"])
def test_files_it_points_to_exist(page):
    file = ROOT / page
    prose = re.sub(r"```.*?```|`[^`]*`", "", file.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)\s#]+)[^)]*\)", prose):
        assert (file.parent / target).exists(), target
