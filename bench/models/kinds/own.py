"""A checkpoint of this library, as ``ironmoe demo`` and ``ironmoe train`` write it."""

from pathlib import Path

import torch

from ironmoe.bench.common.checkpoints import load_checkpoint
from ironmoe.bench.models.loaded import LoadedModel


def load_own(path: Path, device: torch.device) -> LoadedModel:
    """The model of a .safetensors file. The digest of its weights tells the model, so that the file
    may move to another folder.

    Raises:
        CheckpointError: the file cannot be read, or is no such file.
    """
    model, extra = load_checkpoint(path, device)
    return LoadedModel(
        model,
        extra["name"],
        (model.channels, model.image_size, model.image_size),
        extra["classes"],
        {
            "seed": extra["seed"],
            "train_seconds": extra["seconds"],
            "trained_on": extra["checksum"],
            "stem": path.stem,
            "trained_on_data": extra["data"],
        },
        source=f"checkpoint {path}",
        identity=path.name,
    )
