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


def check_model_info(dataset: str, threat_model: str, model_name: str | None) -> None:
    """What can be known of ``write_model_info`` before there are any numbers.

    Raises:
        ValueError: the name is none of a file, or the file of this name holds something else.
    """
    if not model_name or Path(model_name).name != model_name:
        raise ValueError(f"model_name must be the name of a file for to_disk, got {model_name!r}")
    _known(_path(dataset, threat_model, model_name))


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
    path = _path(dataset, threat_model, model_name)
    known = _known(path) | {
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


def _path(dataset: str, threat_model: str, model_name: str) -> Path:
    return Path("model_info") / dataset / threat_model / f"{model_name}.json"


def _known(path: Path) -> dict[str, Any]:
    """What the file says; no more than its fields where there is none yet."""
    if not path.exists():
        return dict.fromkeys(FIELDS)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must hold JSON, got {error}") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(known).__name__}")
    return known
