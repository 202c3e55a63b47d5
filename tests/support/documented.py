"""The examples of the documentation and what stands under them as their output; and what holds for
the one that two tests run."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")),
]
EXAMPLE = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
EXAMPLES = [
    pytest.param(page, code, output, id=f"{page}-{i}")
    for page in PAGES
    for i, (code, output) in enumerate(EXAMPLE.findall((ROOT / page).read_text()))
]
IMAGES_OF_ROUNDING = 2
"""Of a sample, as many may turn out differently on another processor, whose sums round
differently."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def differences(documented, printed, sample=100):
    """What tells two outputs apart: words and the number of lines must be the same; a count may
    differ by IMAGES_OF_ROUNDING images of the sample, a number with a decimal point, a percentage,
    by twice as many of them (the end of an interval moves faster than its middle)."""
    shapes = [NUMBER.sub("#", text).split() for text in (documented, printed)]
    if shapes[0] != shapes[1]:
        return [f"words: {documented!r} is not {printed!r}"]

    pairs = zip(NUMBER.findall(documented), NUMBER.findall(printed), strict=True)
    points = 2 * 100 * IMAGES_OF_ROUNDING / sample
    return [
        f"{one} is not {other}"
        for one, other in pairs
        if abs(float(one) - float(other)) > (points if "." in one else IMAGES_OF_ROUNDING)
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
