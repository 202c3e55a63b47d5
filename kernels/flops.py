"""FLOPs of the operators, for ``torch.utils.flop_counter.FlopCounterMode``: two for each
multiply-add of a matrix product."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

import ironmoe.kernels.expert_down  # noqa: F401, the operators exist once it is imported

COUNTER = "torch.utils.flop_counter"


def _up(
    x: Any,
    weight: Any,
    bias: Any,
    offsets: Any,
    tiles_2n: Any,
    row_token: Any,
    *args: Any,
    **kwargs: Any,
) -> int:
    rows = x[0] if row_token is None else row_token[0]
    return 2 * rows * weight[1] * weight[2]


def _up_backward(dh: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    want_x, want_w, _ = args[-3:]
    return 2 * dh[0] * weight[1] * weight[2] * (want_x + want_w)


def _down(
    gates: Any, w_out: Any, b_out: Any, hidden: Any, activated: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * activated[0] * w_out[1] * w_out[2]


def _down_backward(dy: Any, gates: Any, w_out: Any, *args: Any, **kwargs: Any) -> int:
    want_gates, want_w, _, want_h = args[-4:]
    return 2 * gates[0] * gates[1] * w_out[1] * w_out[2] * ((want_gates or want_h) + want_w)


def _onednn_linear(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * a[0] * b[0] * b[1]


def register(counter: ModuleType) -> None:
    """Tell torch's counter."""
    operators = torch.ops.ironmoe
    counter.register_flop_formula(operators.grouped_matmul)(_up)
    counter.register_flop_formula(operators.grouped_matmul_backward)(_up_backward)
    counter.register_flop_formula(operators.expert_down)(_down)
    counter.register_flop_formula(operators.expert_down_backward)(_down_backward)
    if torch.backends.mkldnn.is_available():
        counter.register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_onednn_linear)


class _WhenImported(MetaPathFinder):
    """Registers when somebody imports the counter. It imports Triton, which ``import
    ironmoe.kernels`` must not."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            register(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
