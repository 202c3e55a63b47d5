"""Models on several devices, with torch.distributed: expert parallelism, its gradients, checkpoints
and errors."""

from ironmoe.moe.exchange.errors import ExchangeError, RanksDisagreeError
from ironmoe.moe.exchange.traffic import Traffic, counted_traffic
from ironmoe.moe.parallel.checkpoint import LoadedCheckpoint, load_checkpoint, save_checkpoint
from ironmoe.moe.parallel.clip_grad_norm import clip_grad_norm_
from ironmoe.moe.parallel.gradients import average_gradients
from ironmoe.moe.parallel.layers import overflowed_choices
from ironmoe.moe.parallel.lock_step import in_step
from ironmoe.moe.parallel.parallelize import parallelize
from ironmoe.moe.parallel.together import naming_ranks
from ironmoe.moe.parallel.weights_files import load_weights, save_weights

__all__ = [
    "ExchangeError",
    "LoadedCheckpoint",
    "RanksDisagreeError",
    "Traffic",
    "average_gradients",
    "clip_grad_norm_",
    "counted_traffic",
    "in_step",
    "load_checkpoint",
    "load_weights",
    "naming_ranks",
    "overflowed_choices",
    "parallelize",
    "save_checkpoint",
    "save_weights",
]
