"""What the command line of ``ironmoe attack`` says, and what of it makes two runs the same run."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.bench.attack.attacked_images import AttackedImages, ImageOptions
from ironmoe.bench.attack.suite import Suite
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.overrides import Overrides


class AttackOptions(NamedTuple):
    """What the command line says.

    ``checks``, the budgets, ``save_images``, ``on_bad``, ``offload_experts``, ``recompute`` and
    ``expert_parallel`` change nothing that is found, nor do the workers of ``data``: a run may go
    on with others. ``passes`` and ``on_bad`` are those of ``evaluate``.
    """

    checkpoint: Path | None
    model_spec: str | None
    data: ImageOptions
    suite: Suite
    batch_size: int
    device: torch.device
    out: Path | None
    overrides: Overrides = Overrides()
    checks: bool = True
    max_seconds: float | None = None
    max_forwards: int | None = None
    save_images: str | None = None
    passes: int | None = None
    on_bad: Literal["raise", "skip"] = "raise"
    weights: Path | None = None
    offload_experts: bool = False
    recompute: bool = False
    expert_parallel: int = 1

    def settings(self, loaded: LoadedModel, images: AttackedImages) -> dict[str, Any]:
        """What makes two runs the same run."""
        passes = {} if self.passes is None else {"passes": self.passes}
        return (
            passes
            | images.settings
            | {
                "model": loaded.identity,
                "name": loaded.name,
                "facts": loaded.facts,
                "weights": model_digest(loaded.model),
                "all": self.data.everything,
                "images": self.data.most,
                "together": images_per_unit(loaded.model, self.batch_size),
                "attacks": self.suite.settings,
                "device": self.device.type,
                "ironmoe": versions()["ironmoe"],
            }
        )
