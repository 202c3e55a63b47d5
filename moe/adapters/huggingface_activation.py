"""Which of ironmoe's activations a Hugging Face Experts module computes: told by trying it."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels import ACTIVATIONS

_WEIGHTS = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
)


def decide(experts: nn.Module) -> str | None:
    """The name of the activation that does what the module's own does, or None and a warning. In a
    thread of its own: no autocast, no inference mode, no fake tensors and no transform are at work
    there."""
    with ThreadPoolExecutor(1) as thread:
        name, reason = thread.submit(_same_activation, experts).result()
    if name is None:
        warn_once(experts, reason)
    return name


def warn_once(experts: nn.Module, reason: str) -> None:
    """Say that modules of this class do not run on ironmoe's kernels, and why."""
    _warn_once(f"{type(experts).__name__} keeps the eager experts of transformers: {reason}")


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _same_activation(experts: Any) -> tuple[str | None, str]:
    """(name, "") of the activation with the values and slopes of the module's own, tried on
    numbers; or (None, why there is none)."""
    if getattr(experts, "has_post_expert_norm", False):
        return None, "it normalises what each expert gives"
    own = (
        name.removeprefix("parametrizations.")
        for name, _ in chain(experts.named_parameters(), experts.named_buffers())
    )
    unknown = sorted({name for name in own if name.split(".")[0] not in _WEIGHTS})
    if unknown:
        return None, f"it holds {', '.join(unknown)}, which ironmoe does not know"
    own_name = "_apply_gate" if experts.has_gate else "act_fn"
    hidden = _probe().requires_grad_()
    try:
        value = getattr(experts, own_name)(hidden)
        (slope,) = torch.autograd.grad(value.sum(), hidden)
    except Exception as error:
        return None, f"its {own_name} could not be tried ({type(error).__name__}: {error})"
    hidden = hidden.detach()
    for name, activation in ACTIVATIONS.items():
        if activation.gated == experts.has_gate:
            expected = activation.value(hidden)
            if _same(value, expected) and _same(
                slope, activation.backward(torch.ones_like(expected), hidden)
            ):
                return name, ""
    act_fn = getattr(experts, "act_fn", None)
    kind = "" if act_fn is None else f" with {getattr(act_fn, '__name__', type(act_fn).__name__)}"
    return None, f"ironmoe has no activation like its {own_name}{kind}"


def _probe() -> Tensor:
    """(64, 64) pre-activations: the halves from −20 to 20, so that cuts at such numbers are met
    exactly, and numbers up to ±1e6."""
    points = torch.cat(
        [torch.arange(-40, 41) / 2, torch.tensor([-1e6, -1e4, -1e2, 1e2, 1e4, 1e6])]
    ).double()
    return points[torch.randint(len(points), (64, 64), generator=torch.Generator().manual_seed(0))]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(
        ours.double(), theirs, rtol=1e-5, atol=1e-5
    )
