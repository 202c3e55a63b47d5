"""The exponential moving average of weights: what is evaluated and kept in place of the last step
(Gowal et al., arXiv 2010.03593)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ironmoe.attacks.training.inner.lent import inside_of_ddp
from ironmoe.moe.routers.global_load import GlobalLoad
from ironmoe.moe.routers.selection_bias import WithSelectionBias
from ironmoe.moe.routers.wrapped import plain_name
from ironmoe.moe.sharded import give_back_gathered, local_values


class EMA:
    """Averages of a model's weights, in at least float32.

    Update t, from 0, is average ← d · average + (1 − d) · weight, d = min(decay, (1 + t) /
    (10 + t)). Buffers, such as the statistics of batch norm or the selection bias of a router, are
    no averages: the model's own count. So do the choices that its routers have counted.

    Args:
        model: after ``fully_shard``, if it is sharded; it may be wrapped by DistributedDataParallel
            or torch.compile.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.model = model
        self.decay = float(decay)
        self.updates = 0
        self._applied = False
        self._averages = {
            name: weight.detach().to(_wide(weight), copy=True)
            for name, weight in _weights(model).items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights into the averages; call it after each step of the optimizer.

        RuntimeError: the averages are in the model.
        ValueError: the model has other weights than before.
        """
        if self._applied:
            raise RuntimeError("update must not be called inside applied()")
        weights = _weights(self.model)
        _check_same(self._averages, weights, "model")
        for name, weight in weights.items():  # a user may have moved the model
            self._averages[name] = self._averages[name].to(weight.device)

        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        # expert parallelism shards some weights and leaves others alone: torch mixes them nowhere
        averages = [local_values(self._averages[name]) for name in weights]
        values = [local_values(weight.detach()).to(_wide(weight)) for weight in weights.values()]
        torch._foreach_lerp_(averages, values, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Inside the block the model has the averages as its weights. It has its own back
        afterwards, bit for bit, also after an exception."""
        weights = _weights(self.model)
        _check_same(self._averages, weights, "model")
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        before, self._applied = self._applied, True
        try:
            _put(weights, self._averages)
            yield self.model
        finally:
            give_back_gathered(self.model)
            _put(weights, kept)
            self._applied = before

    def copy_to(self, model: nn.Module) -> None:
        """Write the averages, and the buffers and counts of the averaged model, into another model
        of the same kind. From a sharded model each process must call it.

        ValueError: it has other weights.
        """
        weights = _weights(model)
        _check_same(self._averages, weights, "model")
        _put(weights, self._averages)
        others = _modules(model)
        for name, module in _modules(self.model).items():
            _copy_state(module, others[name])

    def state_dict(self) -> dict[str, Any]:
        """The number of updates, and each average under the name of its weight; copies."""
        averages = {f"average.{name}": value.clone() for name, value in self._averages.items()}
        return {"updates": self.updates} | averages

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was called. ValueError: it belongs to another model."""
        prefix = "average."
        found = {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        _check_same(self._averages, found, "state")
        _put(self._averages, found)
        self.updates = int(state["updates"])


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Floating weights by the names they have without wrappers, sharded ones as they are kept."""
    give_back_gathered(model)
    return {
        plain_name(name): weight
        for name, weight in _inside(model).named_parameters()
        if weight.is_floating_point()
    }


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by the names they have without wrappers; what a wrapper wraps, in its place."""
    return {plain_name(name): module for name, module in _inside(model).named_modules()}


def _inside(model: nn.Module) -> nn.Module:
    """The user's model."""
    inner = getattr(inside_of_ddp(model), "_orig_mod", inside_of_ddp(model))
    return model if inner is model else _inside(inner)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def _put(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in into.items():
        value = values[name]
        if isinstance(value, DTensor) and not isinstance(target, DTensor):
            value = value.full_tensor()
        target.copy_(value)
    torch.clear_autocast_cache()  # an autocast around this would go on with the former weights


def _check_same(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], what: str) -> None:
    """ValueError: other names or shapes."""
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    others = {name: tuple(value.shape) for name, value in got.items()}
    differ = sorted(dict(shapes.items() ^ others.items()))
    if differ:
        raise ValueError(
            f"{what} must have the weights of the averaged model, got a difference in "
            f"{', '.join(differ[:3])}"
        )


@torch.no_grad()
def _copy_state(source: nn.Module, target: nn.Module) -> None:
    """Buffers, and what a router has counted."""
    for name, buffer in source._buffers.items():
        if buffer is not None:
            target.get_buffer(name).copy_(buffer)
    if isinstance(source, WithSelectionBias) and source.choices is not None:
        target.choices = source.choices.clone()

    load = vars(source).get("global_load")
    if isinstance(load, GlobalLoad) and load.counts is not None:
        vars(target)["global_load"].counts = load.counts.clone()
