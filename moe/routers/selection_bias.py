"""The bias that evens out the loads of experts without a loss (arXiv 2408.15664)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels.checks import check_module
from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.exchange.group import every_rank


class WithSelectionBias(nn.Module):
    """A router's selection bias and the counts from which it is updated.

    selection_bias: buffer (E,), float32 or wider whatever the model is cast to: in bfloat16 steps
        of 1e-3 vanish, and the rounding of a cast changes the choice of experts. None without one.
    choices: (E + 1,) int64, how often each expert was chosen in training since the last update;
        place E is for dropped choices, which do not count. It is no buffer, because
        DistributedDataParallel would overwrite it by that of the first process.
    """

    selection_bias: Tensor | None
    choices: Tensor | None
    num_experts: int
    _kept: tuple[Tensor, Tensor] | None

    def make_selection_bias(
        self,
        num_experts: int | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """For this many experts; None makes none."""
        bias = counts = None
        if num_experts is not None:
            wide = _wide(dtype or torch.get_default_dtype())
            bias = torch.zeros(num_experts, device=device, dtype=wide)
            counts = torch.zeros(num_experts + 1, device=device, dtype=torch.int64)
        self.register_buffer("selection_bias", bias)
        self.choices = counts
        self._remember_bits()

    @torch.no_grad()
    def update_selection_bias(self, rate: float = 1e-3) -> None:
        """Move each expert's selection bias by ``rate`` towards an even load: up if it was chosen
        less than the mean since the last update, down if more (arXiv 2408.15664, algorithm 1). Call
        it once a step; with several processes, sum ``router.choices`` over them first. The function
        of the same name does both for all routers of a model."""
        if self.selection_bias is None or self.choices is None:
            raise ValueError("update_selection_bias needs a router made with selection_bias=True")
        self.widen_selection_bias()
        load = self.choices[: self.num_experts].to(self.selection_bias.dtype)
        self.selection_bias += rate * (load.mean() - load).sign().to(self.selection_bias.device)
        self.choices.zero_()
        self._remember_bits()

    def widen_selection_bias(self) -> None:
        """Undo a cast that replaced the numbers of the buffer without a word to this module: the
        first version of FSDP casts buffers so (``MixedPrecision(buffer_dtype=…)``)."""
        bias = self.selection_bias
        if bias is None or bias.dtype == _wide(bias.dtype) or self._kept is None:
            return
        buffer, view = self._kept
        if buffer is bias:
            bias.data = view.to(bias.device)

    def _remember_bits(self) -> None:
        """Keep the buffer and a view of its memory, which stays when the buffer gets another."""
        bias = self.selection_bias
        self._kept = None if bias is None else (bias, bias.detach())

    def reset_selection_bias(self) -> None:
        """Bias and counts become 0."""
        if self.selection_bias is not None and self.choices is not None:
            self.selection_bias.zero_()
            self.choices.zero_()

    def count_choices(self, experts_TK: Tensor) -> None:
        """Add the choices of one pass."""
        assert self.choices is not None
        chosen = experts_TK.detach().flatten().long()
        if self.choices.device != chosen.device:  # a library moved parameters and buffers only
            self.choices = self.choices.to(chosen.device)
        self.choices.scatter_add_(0, chosen, torch.ones_like(chosen))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``half``, ``cuda`` and ``to_empty`` call."""
        bias, counts = self.selection_bias, self.choices
        super()._apply(fn, recurse)
        if bias is not None and counts is not None and self.selection_bias is not None:
            wide = _wide(self.selection_bias.dtype)
            self.selection_bias = _moved(bias, self.selection_bias, wide)
            self.choices = _moved(counts, self.selection_bias, torch.int64)
            self._remember_bits()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # load_state_dict(assign=True) takes the dtype of the checkpoint
        if self.selection_bias is not None and not self.selection_bias.is_meta:
            self.selection_bias = self.selection_bias.to(_wide(self.selection_bias.dtype))
            self._remember_bits()


def update_selection_bias(
    model: nn.Module, rate: float = 1e-3, *, all_processes: bool = False
) -> None:
    """``router.update_selection_bias(rate)`` for every router of the model that has a selection
    bias. Call it once a step, after ``optimizer.step()``.

    Args:
        model: a layer, or any module around layers.
        rate: how far a bias moves.
        all_processes: sum the choices over the processes of ``torch.distributed`` before, each of
            which must call this; in a single process it changes nothing.

    Raises:
        ValueError: no router of the model has a selection bias.
        TypeError: the model is no module.
        ExchangeError: a process did not take part.
    """
    check_module(model)
    routers = [
        module
        for module in model.modules()
        if isinstance(module, WithSelectionBias) and module.selection_bias is not None
    ]
    if not routers:
        raise ValueError(
            "model must have a router made with selection_bias=True, got none in "
            f"{type(model).__name__}"
        )
    for router in routers:
        if all_processes and not is_alone():
            assert router.selection_bias is not None and router.choices is not None
            router.choices = router.choices.to(router.selection_bias.device)
            every_rank().sum(router.choices)
        router.update_selection_bias(rate)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _moved(before: Tensor, after: Tensor, dtype: torch.dtype) -> Tensor:
    """``before`` in this dtype where ``after`` lies; without values where one of them has none."""
    if before.is_meta or after.is_meta:
        return torch.zeros_like(before, device=after.device, dtype=dtype)
    return before.to(after.device, dtype)
