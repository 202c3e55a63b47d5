"""``ironmoe attack``: a saved model, attacked with settings of its own."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ironmoe.bench.data import DataError, ImageData
from ironmoe.bench.demo import NEEDED_BYTES, default_folder, facts_of, finish, measure_all, progress_bars
from ironmoe.bench.measure import AttackSettings
from ironmoe.bench.models import load_checkpoint
from ironmoe.bench.run_folder import RunFolder
from ironmoe.bench.summary import ModelResults
from ironmoe.bench.versions import versions


def run_attack(
    checkpoint: Path,
    data: ImageData,
    everything: bool,
    attack: AttackSettings,
    seed: int,
    device: torch.device,
    attack_dtype: torch.dtype | None,
    out: Path | None,
    console: Console,
) -> Path:
    """Measure what ``ironmoe demo`` measures, without training; returns the folder."""
    model, extra = load_checkpoint(checkpoint, device)
    image_shape = tuple(data.images.shape[1:])
    expected = (model.channels, model.image_size, model.image_size)
    if image_shape != expected:
        raise DataError(f"data {data.name!r} must have images of shape {expected} for {checkpoint}, got {image_shape}")
    if data.classes != extra["classes"]:
        raise DataError(f"data {data.name!r} must have the classes of {checkpoint}, {extra['classes']}, got {data.classes}")
    settings: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "model": extra["name"],
        "model_seed": extra["seed"],
        "trained_on": extra["checksum"],
        "data": data.name,
        "checksum": data.checksum,
        "skipped": data.skipped,
        "all": everything,
        "attack": attack._asdict(),
        "seed": seed,
        "device": device.type,
        "attack_dtype": str(attack_dtype),
        "ironmoe": versions()["ironmoe"],
    }
    if everything and data.checksum == extra["checksum"]:
        console.print("Note: with --all on the data it was trained on, most images are ones the model has learnt from.")
    folder = RunFolder(out or default_folder(f"attack-{checkpoint.stem}", settings), settings, NEEDED_BYTES)
    console.print(f"{'Going on in' if folder.resumed else 'Writing to'} {folder.path}/", highlight=False)
    rows = torch.arange(len(data.images)) if everything else data.split()[1]
    rows = rows[: attack.images]
    with progress_bars(console) as progress:
        measured, examples = measure_all(
            model, extra["name"], data.images[rows], data.labels[rows], seed, attack, attack_dtype, folder, progress
        )
    facts = facts_of(model, image_shape) | {"seed": extra["seed"], "train_seconds": extra["seconds"]}
    models = [ModelResults(extra["name"], [facts | measured])]
    title = f"{extra['name']} (seed {extra['seed']}) under attack: {data.name}"
    finish(models, {extra["name"]: examples}, folder, settings, title, data.classes, attack, device, console)
    return folder.path
