import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


class _Anything:
    """Has every attribute, may be called with anything, and is a decorator that leaves a test as it
    is.
    """

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self


class _Decorator(_Anything):
    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and callable(arguments[0]) else self


class _NoHypothesis(ModuleType):
    """Hypothesis on a machine that lacks it, as one with a GPU may: its tests are skipped, and the
    others of the same file run.
    """

    def __init__(self, name: str, anything: _Anything) -> None:
        super().__init__(name)
        self.__spec__, self._anything = ModuleSpec(name, None), anything

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._anything


if find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("ironmoe", deadline=None, max_examples=60, derandomize=True)
    settings.load_profile("ironmoe")
else:
    strategies = _NoHypothesis("hypothesis.strategies", _Anything())
    hypothesis = _NoHypothesis("hypothesis", _Decorator())
    hypothesis.strategies, hypothesis.given = (
        strategies,
        lambda *_, **__: pytest.mark.skip(reason="needs hypothesis"),
    )
    sys.modules |= {"hypothesis": hypothesis, "hypothesis.strategies": strategies}
torch.set_flush_denormal(True)
HAS_TRITON = find_spec("triton") is not None
collect_ignore = [] if HAS_TRITON else ["kernels/gpu"]


def _import_kernels_interpreted() -> None:
    """Triton decides when a kernel is imported, its own library included, whether it is
    interpreted."""
    os.environ["TRITON_INTERPRET"] = "1"
    package = import_module("ironmoe.kernels.gpu")
    for module in pkgutil.iter_modules(package.__path__):
        import_module(f"ironmoe.kernels.gpu.{module.name}")
    del os.environ["TRITON_INTERPRET"]


def _spare_the_interpreter_repetitions() -> None:
    """What the interpreter does again and again with the same result took a third of its time.

    It puts its own functions into triton.language for every function that a kernel calls, although
    they are there from the launch on. Only a module that was not reached by then,
    triton.language.core for the functions of Triton's own library, is still to be done. And it
    makes a table of all dtypes whenever it looks one up.

    Both are private functions of Triton, the same from 3.6 to 3.9. Where they are not, nothing is
    spared.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "_get_np_dtype"):
        return
    patch, patched = interpreter._patch_lang, []

    def patch_once(fn):
        seen = [
            module
            for module in (language, language.core)
            if any(value is module for value in fn.__globals__.values())
        ]
        if all(module in patched for module in seen):
            return None  # a call inside a kernel, which makes no use of it
        scope = patch(fn)
        if not patched:  # the launch itself
            scope.restore = partial(_all_of, patched.clear, scope.restore)
        patched.extend(seen)
        return scope

    look_up, known = interpreter._get_np_dtype, {}

    def look_up_once(dtype):
        if type(dtype) is not language.dtype:  # a pointer, or a block
            return look_up(dtype)
        if dtype.name not in known:
            known[dtype.name] = look_up(dtype)
        return known[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, look_up_once
    _make_types_once(language.core)
    _leave_out_overflow_checks(interpreter.interpreter_builder)


def _make_types_once(core: ModuleType) -> None:
    """Every operator makes the type of its result again, with a name and a tuple of its sizes. Here
    a block type or a tensor gets the attributes of the first one of its kind; nobody changes them.
    """
    make_type, types = core.block_type.__init__, {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [size if type(size) is int else core._unwrap_if_constexpr(size) for size in shape]
        key = (element_ty.name, *sizes)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        self.__dict__.update(types[key])

    make_tensor, tensors = core.tensor.__init__, {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        self.__dict__.update(tensors[type.name], handle=handle)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _leave_out_overflow_checks(builder: Any) -> None:
    """For each sum and product of integers the interpreter computes another one in int64 and
    compares, which a compiled kernel does not. ``test_large_offsets`` tests what could overflow.
    """
    if hasattr(builder.options, "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)


def _all_of(*functions: Callable[[], None]) -> None:
    for function in functions:
        function()


if HAS_TRITON and not torch.cuda.is_available():
    _import_kernels_interpreted()
    _spare_the_interpreter_repetitions()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def rounding() -> Callable[..., float]:
    """How far two right computations of the same numbers may be apart: ``rounding(terms, values)``.

    A processor may add in any order, with or without fused products, in vectors of any length. A
    sum of n terms in any order has an error below λ √n u times the largest sum of magnitudes, but
    with a probability of 2 exp(−λ²/2) (Higham & Mary, SIAM J. Sci. Comput. 2019); u is half of eps.
    Here λ = 8, so that no processor and no seed passes it by chance.

    terms:  how many roundings lie on the way from an input to a result, one layer after another: a
        product of width n has n.
    values: what was computed, or its largest magnitude. Layers in between must not have much larger
        ones.
    """

    def bound(terms: int, values: Tensor | float, dtype: torch.dtype | None = None) -> float:
        largest = float(values.detach().abs().max()) if isinstance(values, Tensor) else values
        eps = torch.finfo(
            dtype or (values.dtype if isinstance(values, Tensor) else torch.float32)
        ).eps
        return 8 * terms**0.5 * eps / 2 * largest

    return bound


@pytest.fixture
def device(monkeypatch) -> str:
    """Where kernels run: the GPU, or CPU tensors in Triton's interpreter. Without this fixture CPU
    tensors take the twin."""
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
