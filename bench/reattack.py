"""``ironmoe attack``: a model from anywhere, attacked with settings of its own."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ironmoe.bench.data import DataError, ImageData
from ironmoe.bench.demo import NEEDED_BYTES, default_folder, facts_of, finish, measure_all, progress_bars
from ironmoe.bench.measure import AttackSettings
from ironmoe.bench.model_source import fingerprint, load_model, match_classes
from ironmoe.bench.run_folder import RunFolder
from ironmoe.bench.summary import ModelResults
from ironmoe.bench.versions import versions


def run_attack(
    checkpoint: Path | None,
    model_spec: str | None,
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
    loaded = load_model(checkpoint, model_spec, data, device)
    if checkpoint is not None and data.classes != loaded.classes:
        raise DataError(f"data {data.name!r} must have the classes of {checkpoint}, {loaded.classes}, got {data.classes}")
    labels, classes = match_classes(loaded, data)
    image_shape = tuple(data.images.shape[1:])
    settings: dict[str, Any] = {
        "model": model_spec or str(checkpoint),
        "name": loaded.name,
        "facts": loaded.facts,
        "weights": fingerprint(loaded.model),
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
    if everything and data.checksum == loaded.facts.get("trained_on"):
        console.print("Note: with --all on the data it was trained on, most images are ones the model has learnt from.")
    folder = RunFolder(out or default_folder(f"attack-{loaded.facts['stem']}", settings), settings, NEEDED_BYTES)
    console.print(f"{'Going on in' if folder.resumed else 'Writing to'} {folder.path}/", highlight=False)
    rows = torch.arange(len(data.images)) if everything else data.split()[1]
    rows = rows[: attack.images]
    with progress_bars(console) as progress:
        measured, examples = measure_all(
            loaded.model, loaded.name, data.images[rows], labels[rows], seed, attack, attack_dtype, folder, progress
        )
    facts = facts_of(loaded.model, image_shape) | {key: loaded.facts[key] for key in ("seed", "train_seconds")}
    models = [ModelResults(loaded.name, [facts | measured])]
    title = f"{loaded.name} under attack: {data.name}"
    finish(models, {loaded.name: examples}, folder, settings, title, classes, attack, device, console)
    return folder.path
