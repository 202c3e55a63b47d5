import os
import pkgutil
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

if find_spec("hypothesis"):  # a machine with a GPU may lack it; what needs no such package is tested there all the same
    from hypothesis import settings

    settings.register_profile("ironmoe", deadline=None, max_examples=60, derandomize=True)
    settings.load_profile("ironmoe")
torch.set_flush_denormal(True)
HAS_TRITON = find_spec("triton") is not None
collect_ignore = [] if HAS_TRITON else ["kernels/gpu"]


def _import_kernels_interpreted() -> None:
    """Triton decides when a kernel is imported, its own library included, whether it is interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    package = import_module("ironmoe.kernels.gpu")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"ironmoe.kernels.gpu.{module.name}")
    del os.environ["TRITON_INTERPRET"]


if HAS_TRITON and not torch.cuda.is_available():
    _import_kernels_interpreted()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device(monkeypatch) -> str:
    """Where kernels run: the GPU, or CPU tensors in Triton's interpreter. Without this fixture CPU tensors take the twin."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
