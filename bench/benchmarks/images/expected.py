"""How long the rows of ``ironmoe bench images`` will take, from a few images."""

import os
import time
from pathlib import Path

import torch

from ironmoe.bench.benchmarks.images.loading import CROP, PlainImages
from ironmoe.bench.benchmarks.images.vit_s import make_model
from ironmoe.bench.models.load import load_model

START_SECONDS = 5.0  # a process imports everything anew
FEW = 8  # images that are timed
# Passes that an image costs, forward and backward: ten steps and what decides it. An image of the
# plain model is decided in the first steps.
PASSES = {"robust": 11, "plain": 2}


def loading_seconds(files: list[str], images: int, workers: int) -> float:
    """About, of a row of one loader."""
    few = PlainImages(files[:FEW])
    start = time.perf_counter()
    for number in range(len(few)):
        few[number]
    at_once = min(max(workers, 1), os.cpu_count() or 1)
    return START_SECONDS + (time.perf_counter() - start) / len(few) * images / at_once


def pass_seconds(source: str, batch_size: int, dtype: str, folder: Path) -> float:
    """About, of one image in a pass of a model of this source, forward and backward."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(None, make_model("plain", source, folder), device).model
    few = min(FEW, batch_size)
    images = torch.rand(few, 3, CROP, CROP, device=device, requires_grad=True)
    seconds = 0.0
    for _ in range(2):  # the first one makes what the second finds
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            output = model(images).float().sum()
        torch.autograd.grad(output, images)[0].cpu()  # the host waits for it
        seconds = time.perf_counter() - start
    return seconds / few


def attack_seconds(of_pass: float, model: str, images: int) -> float:
    """About, of a row of an attack on the "robust" or the "plain" model."""
    return START_SECONDS + of_pass * PASSES[model] * images
