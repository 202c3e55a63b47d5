"""The official evaluation: all images through AutoAttack, and what was found said on the way."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.evaluation.evaluate import evaluate
from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.evaluation.source import Batches
from ironmoe.attacks.extra import Extra, cut, extra_columns
from ironmoe.attacks.standard.log import Log

NAME = "autoattack"


def standard_report(
    attack: Attack,
    data: Batches,
    *,
    bs: int,
    log: Log,
    state_path: Path | str | None = None,
    keep_adversarial: bool = False,
) -> RobustnessReport:
    """The report of one AutoAttack, under the name "autoattack".

    Args:
        attack: an AutoAttack.
        data, keep_adversarial: as in ``evaluate``.
        bs: images in the active batch.
        log: told the initial accuracy, how far it is, and what was found. With a log the images are
            predicted once more, at the beginning, if ``data`` are tensors.
        state_path: the folder of the journal, by which an interrupted call goes on; None: none.

    Raises:
        ValueError: ``state_path`` is a file, such as the official code writes.
    """
    if state_path is not None and Path(state_path).is_file():
        raise ValueError(
            "state_path must be a folder, for a journal that an interrupted call goes on from, got "
            f"the file {str(state_path)!r}; a state of the official code cannot be read"
        )
    if log.is_on:
        is_whole = isinstance(data, tuple) and len(data) in (2, 3)
        log.begins(
            [stage.name for stage in attack.stages],
            clean_accuracy(attack, *data, bs=bs) if is_whole else None,
        )

    report = evaluate(
        attack.model,
        data,
        {NAME: attack},
        batch_size=bs,
        keep_adversarial=keep_adversarial,
        journal=state_path,
        on_progress=log.tells if log.is_on else None,
    )
    if log.is_on:
        summary = report.attacks[NAME]
        is_kept = keep_adversarial and isinstance(data, tuple)
        final = final_images(summary, data[0]) if is_kept else None  # type: ignore[index]
        log.ends(attack.norm, report, summary, final)
    return report


def final_images(summary: AttackSummary, x: Tensor) -> Tensor:
    """(N, …) the adversarial images, and the clean ones (N, …) where none was found."""
    assert summary.adversarial is not None
    return where(summary.fell.to(x.device), summary.adversarial.to(x), x)


def clean_accuracy(
    attack: Attack, x: Tensor, y: Tensor, extra: Extra | None = None, *, bs: int = 250
) -> float:
    """The share of the images (N, …) that the model of an attack gives their labels (N,), each
    predicted once, in batches of ``bs``."""
    model = attack.attacked_model
    model.image_dtype = x.dtype
    wide = torch.promote_types(x.dtype, torch.float32)
    right = 0
    with borrowed(attack.model):
        for first in range(0, len(x), bs):
            places = slice(first, first + bs)
            images = x[places].detach().to(model.device or x.device, wide)
            columns: dict[str, Any] = extra_columns(cut(extra, len(x), places), len(images))
            columns = {name: column.to(images.device) for name, column in columns.items()}
            predicted = attack.goal.prediction(model.predict(images, columns))
            right += int((predicted == y[places].to(predicted.device)).sum())
    return right / max(len(x), 1)
