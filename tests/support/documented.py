"""The examples of the documentation, and what holds for the one that two tests run."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(page, code, id=f"{page}-{i}")
    for page in PAGES
    for i, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    )
]


def cuda_graph_example():
    """Its code."""
    (code,) = (example.values[1] for example in EXAMPLES if "CUDAGraph" in example.values[1])
    return code


def check_point(variables, start, moved_by):
    """``point`` is inside the ball, most of it has moved as far as it may, and the image is the
    same in its own dtype."""
    point, image = variables["point"], variables["image"]
    assert (variables["low"] <= point).all() and (point <= variables["high"]).all()
    assert torch.equal(image, point.to(image.dtype))
    distance = (point - start).abs()
    assert distance.max() <= moved_by * (1 + 1e-4)
    assert (distance > 0.9 * moved_by).double().mean() > 0.5
