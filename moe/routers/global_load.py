"""The load of a global batch: choices counted over micro-batches and processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ironmoe.kernels.checks import check_module
from ironmoe.kernels.route import recomputing
from ironmoe.moe.exchange.alone import is_alone
from ironmoe.moe.exchange.group import every_rank, known_group


class GlobalLoad:
    """How often each expert was chosen since ``start_global_batch``, in all processes.

    It is no buffer: DistributedDataParallel would overwrite it by that of the first process. Copies
    and pickles of a router begin with nothing counted.

    counts: (…, E) int64; None before the first pass.
    process_group: the processes whose counts are summed; None: all.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.process_group: Any = None

    @torch.no_grad()
    def add(self, counts: Tensor) -> Tensor:
        """The load with the choices of this pass. Each process must take part, also one that has no
        token. A pass that activation checkpointing repeats adds nothing."""
        if self.counts is None or self.counts.is_meta or type(self.counts) is not type(counts):
            self.counts = torch.zeros_like(counts)  # those of a fake or meta tensor had no values
        if self.counts.device != counts.device:
            self.counts = self.counts.to(counts.device)
        if not recomputing():
            if not is_alone():
                self._sum(counts)
            self.counts += counts
        return self.counts

    def _sum(self, counts: Tensor) -> None:
        """Over the processes. Compiled code has the sum in its graph, and names no process that is
        missing."""
        if torch.compiler.is_compiling():
            dist.all_reduce(counts, group=self.process_group)
            return
        ranks = every_rank() if self.process_group is None else known_group(self.process_group)
        ranks.sum(counts)

    def reset(self) -> None:
        """Nothing is counted."""
        if self.counts is not None:
            self.counts.zero_()

    def __reduce__(self) -> tuple[type["GlobalLoad"], tuple[()]]:
        return GlobalLoad, ()


def start_global_batch(model: nn.Module) -> None:
    """Forget the choices that routers with ``balance="global_batch"`` have counted. Call it once an
    optimizer step, before its first micro-batch; without it the load is that of all steps since the
    model was made.

    Raises:
        TypeError: the model is no module.
    """
    check_module(model)
    for module in model.modules():
        load = vars(module).get("global_load")
        if isinstance(load, GlobalLoad):
            load.reset()
