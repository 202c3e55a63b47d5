"""A study of small models on few images, which takes a second."""

import json

import torch
from rich.console import Console

from ironmoe.bench.common.checkpoints import save_checkpoint
from ironmoe.bench.study.ladder.arms import Size
from ironmoe.bench.study.ladder.training import TrainingSettings
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.options import StudyOptions
from ironmoe.moe import VMoE

QUIET = Console(quiet=True)
TINY = TrainingSettings(
    size=Size(dim=16, depth=2, heads=2, mlp_dim=32, moe_blocks=1), epochs=1, batch_size=20, steps=1
)
BUDGET = Budget(radii=(8.0,), radius=8.0, images=8, routed_images=6, steps=2)


def options(few, path, **changes):
    settings = {
        "arms": ("dense", "E4"),
        "trainings": ("standard",),
        "seeds": 1,
        "training": TINY,
        "budget": BUDGET,
        "measurements": ("clean", "curve", "interventions"),
        "out": path,
    }
    return StudyOptions(few, **settings | changes)


def report(path):
    """The numbers, with the values of each run beside its name."""
    found = json.loads((path / "report.json").read_text())
    for place, model in enumerate(found["runs"]):
        columns = found["values"].items()
        model["values"] = {name: row[place] for name, row in columns if row[place] is not None}
    return found


def checkpoint(path, seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {
        "image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32,
        "num_classes": 3, "channels": 1, **changes,
    }  # fmt: skip
    model = VMoE(**arguments)
    torch.nn.init.normal_(model.head.weight)
    extra = {
        "name": "own", "seed": seed, "seconds": 1.0, "data": "few", "checksum": "",
        "classes": list("012"),
    }  # fmt: skip
    path.write_bytes(save_checkpoint(model, arguments, extra))
    return model.eval()
