import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_is_an_example_for_each_kind_of_user():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["layer", "kernels", "robustness"])
def test_examples_run(example):
    exec(compile(example, "README.md", "exec"), {})


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
