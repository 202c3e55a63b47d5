"""Models on several devices, with torch.distributed: expert parallelism, its gradients and
errors."""

from ironmoe.moe.exchange.errors import ExchangeError, RanksDisagreeError
from ironmoe.moe.exchange.traffic import Traffic, counted_traffic
from ironmoe.moe.parallel.clip_grad_norm import clip_grad_norm_
from ironmoe.moe.parallel.gradients import average_gradients
from ironmoe.moe.parallel.layers import overflowed_choices
from ironmoe.moe.parallel.lock_step import in_step
from ironmoe.moe.parallel.parallelize import parallelize

__all__ = [
    "ExchangeError",
    "RanksDisagreeError",
    "Traffic",
    "average_gradients",
    "clip_grad_norm_",
    "counted_traffic",
    "in_step",
    "overflowed_choices",
    "parallelize",
]
