"""How the learning rate rises and falls over a training.

Each schedule gives the rates of any step, so an interrupted training goes on with the same ones.
"""

import math
import warnings
from collections.abc import Callable

import torch

# (an optimizer, all steps of the training) → what sets the optimizer's rates before step 0, 1, 2 …
LearningRateSchedule = Callable[[torch.optim.Optimizer, int], Callable[[int], None]]


def one_cycle(warmup: float) -> LearningRateSchedule:
    """Learning rate and momentum go up and down once, by ``torch.optim.lr_scheduler.OneCycleLR``.

    warmup: the share of the steps in which the learning rate rises.
    """

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], None]:
        highest = optimizer.param_groups[0]["lr"]
        # OneCycleLR divides by the steps of the rise minus 1
        rise = warmup if warmup * steps != 1 else 1.001 * warmup
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, highest, total_steps=steps, pct_start=rise
        )

        def set_rates(step: int) -> None:
            # The scheduler itself has set the rates of step 0. A training that goes on catches up
            # before its first step, of which the scheduler would warn.
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "Detected call of `lr_scheduler.step", UserWarning
                )
                while scheduler.last_epoch < step:
                    scheduler.step()

        return set_rates

    return schedule


def warmup_and_cosine(warmup: float) -> LearningRateSchedule:
    """Linear warm-up, then cosine decay to 0.

    warmup: the share of the steps in which the learning rate rises.
    """

    def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Callable[[int], None]:
        highest = [group["lr"] for group in optimizer.param_groups]

        def set_rates(step: int) -> None:
            share = _share_of_rate(step / steps, warmup)
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * share

        return set_rates

    return schedule


def _share_of_rate(done: float, warmup: float) -> float:
    """The learning rate as a share of the highest, after a share ``done`` of all steps."""
    if done < warmup:
        return (done + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
