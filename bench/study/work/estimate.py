"""How long a study will take: passes are counted, and a pass is timed on this machine."""

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

from ironmoe.bench.study.ladder.training import TrainingSettings
from ironmoe.bench.study.work.worker import Task
from ironmoe.bench.train.recipe import STANDARD

TRAINING_STEP = 1.5  # passes of one image: its backward pass makes gradients of the weights, too
BESIDE = 1.4  # what a study takes over the time of its passes; two of them took 1.2 and 1.5
HELD_OUT_STEPS = 10  # of the attack on held-out images after each epoch
ROUNDS = 3
BATCH = 100


def training_passes(training: str, settings: TrainingSettings, images: int, held_out: int) -> float:
    """About how many forward and backward passes of one image a training takes."""
    of_image = TRAINING_STEP + (0 if training == STANDARD else settings.steps)
    return settings.epochs * (images * of_image + held_out * HELD_OUT_STEPS)


def measuring_passes(task: Task) -> float:
    """About how many passes the measurements of a task take, those that are done included."""
    return sum(what.passes(task.budget) for what in task.measurements)


def seconds_of_pass(models: Sequence[nn.Module], shape: tuple[int, ...]) -> float:
    """How long a forward and backward pass of one image takes, in a batch: the mean over models of
    the median of a few.

    shape: (C, S, S) of an image.
    """
    images = torch.rand(BATCH, *shape)
    times = []
    for model in models:
        of_model = []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            x = images.clone().requires_grad_()
            output = model(x).sum()
            if output.requires_grad:  # a model that was handed in may have no gradient
                torch.autograd.grad(output, x)
            of_model.append(time.perf_counter() - start)
        times.append(median(of_model[1:]) / BATCH)  # the first one makes what the others find
    return sum(times) / len(times)
