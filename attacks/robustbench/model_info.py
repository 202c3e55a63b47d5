"""The file about a model that RobustBench's leaderboard is made of."""

import json
import os
from pathlib import Path
from typing import Any

FIELDS = (
    "link",
    "name",
    "authors",
    "additional_data",
    "number_forward_passes",
    "dataset",
    "venue",
    "architecture",
    "eps",
    "clean_acc",
    "reported",
    "corruptions_acc",
    "corruptions_acc_3d",
    "corruptions_mce",
    "corruptions_mce_3d",
    "autoattack_acc",
    "footnote",
)


def write_model_info(
    *,
    dataset: str,
    threat_model: str,
    model_name: str,
    eps: float,
    clean: float,
    robust: float,
) -> Path:
    """Write ``model_info/DATASET/THREAT_MODEL/MODEL_NAME.json`` below the working directory, and
    return its path. What else a file of this name says stays.

    Args:
        clean, robust: accuracies from 0 to 1; the file has them in per cent, as text.
    """
    path = Path("model_info") / dataset / threat_model / f"{model_name}.json"
    known: dict[str, Any] = dict.fromkeys(FIELDS)
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    known |= {
        "dataset": dataset,
        "eps": eps,
        "clean_acc": str(round(100 * clean, 2)),
        "autoattack_acc": str(round(100 * robust, 2)),
    }

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")  # an interruption leaves the old file
    beside.write_text(json.dumps(known, indent=2), encoding="utf-8")
    beside.replace(path)
    return path
