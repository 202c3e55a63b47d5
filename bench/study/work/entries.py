"""The models of one study: those of the ladder, and those that a user hands in."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import nn

from ironmoe.bench.common.checkpoints import load_checkpoint
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.ladder.initial import constant_gates_known
from ironmoe.bench.study.ladder.training import ModelRun, TrainingSettings, train_model
from ironmoe.moe.checkpoints.errors import CheckpointError

CPU = torch.device("cpu")


class Entry(NamedTuple):
    """A model to measure. arm: its architecture; training: how it was trained; seed: what pairs it
    with other arms; file: where its weights will be after its training, None for a model that is
    not trained here; get: trains or loads it, in eval mode."""

    arm: Arm
    training: str
    seed: int
    file: Path | None
    get: Callable[[Console], nn.Module]

    @property
    def is_trained(self) -> bool:
        return self.file is None or self.file.exists()

    @property
    def name(self) -> str:
        """In tables and messages."""
        return f"{self.arm.name}, {self.training}, seed {self.seed}"

    @property
    def slug(self) -> str:
        """Of its files."""
        return ModelRun(self.arm.name, self.training, self.seed).name


def ladder_entry(
    arm: Arm, training: str, seed: int, data: ImageData, settings: TrainingSettings, folder: Path
) -> Entry:
    """A model of the ladder, whose weights lie in ``folder``. ``get`` raises CheckpointError where
    its file is damaged, or is that of another model."""
    run = ModelRun(arm.name, training, seed)

    def get(console: Console) -> nn.Module:
        with constant_gates_known():
            return _read(train_model(run, data, settings, folder, console), run)

    return Entry(arm, training, seed, folder / f"{run.name}.safetensors", get)


def _read(file: Path, run: ModelRun) -> nn.Module:
    remedy = "delete the file, and the model is trained again"
    try:
        model, extra = load_checkpoint(file, CPU)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    if extra.get("run") != run._asdict():
        raise CheckpointError(f"{file} must hold {run.name}, got {extra.get('name')}; {remedy}")
    return model
