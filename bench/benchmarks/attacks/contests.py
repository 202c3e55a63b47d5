"""The contests of ``ironmoe bench attacks``: which attack, on which model, by which libraries."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ironmoe.bench.benchmarks.attacks.libraries import (
    LibraryRun,
    PGDSettings,
    autoattack_runs,
    pgd_runs,
)
from ironmoe.bench.benchmarks.attacks.models import MODELS, WIDE

PARTS = ("pgd", "autoattack", "bf16", "reference")
OURS = "ironmoe"
IN_BFLOAT16 = "ironmoe, bf16 search"
PGD_STEPS, PGD_RESTARTS = 40, 5
# Of an image that holds, as counted: 7,300 forward and 1,900 backward passes, each of which costs
# about half a pass in both directions.
AUTOATTACK_PASSES = (7300 + 1900) // 2


class AttackBenchmarkSettings(NamedTuple):
    """Sizes of the benchmark. Radii are in units of the pixel range.

    eps: of the robust model's training; large_eps, small_eps: at which an undefended model falls,
    and at which it mostly holds; images, autoattack_images: how many are attacked; runs,
    autoattack_runs: by each library, of which the median counts; batch_size: for every library;
    epochs: of the training.
    """

    eps: float = 0.1
    large_eps: float = 0.2
    small_eps: float = 0.02
    l2_eps: float = 1.5
    images: int = 200
    autoattack_images: int = 50
    runs: int = 3
    autoattack_runs: int = 1
    batch_size: int = 200
    epochs: int = 12


class Contest(NamedTuple):
    """One attack on one model, by several libraries.

    model: its name; attack: what it is called in the table; runs: by library; images: how many are
    attacked; rounds: runs of each; passes: forward and backward, about, that an image costs at
    most; base: the library that the others are compared with.
    """

    model: str
    attack: str
    runs: dict[str, LibraryRun]
    images: int
    rounds: int
    passes: int
    base: str = OURS

    @property
    def place(self) -> str:
        return f"{self.attack} on the {self.model}"

    def key(self, library: str) -> dict[str, Any]:
        """What tells the row of a library from others."""
        return {
            "attack": self.attack,
            "model": self.model,
            "library": library,
            "compared_with": self.base,
        }


def contests_of(part: str, settings: AttackBenchmarkSettings) -> Iterator[Contest]:
    """The contests of one of PARTS."""
    falls_and_holds = {"V-MoE": settings.large_eps, "robust V-MoE": settings.eps}
    if part == "pgd":
        for model, eps in falls_and_holds.items():
            yield _pgd_contest(model, eps, settings, pgd_runs(_pgd_settings(eps, settings)))

    elif part == "bf16":
        places = [
            ("robust V-MoE", settings.eps),
            (WIDE, settings.large_eps),
            (WIDE, settings.small_eps),
        ]
        for model, eps in places:
            pgd = _pgd_settings(eps, settings)
            runs = {
                OURS: pgd_runs(pgd)[OURS],
                IN_BFLOAT16: pgd_runs(pgd, torch.bfloat16)[OURS],
            }
            yield _pgd_contest(model, eps, settings, runs)._replace(base=IN_BFLOAT16)

    elif part == "autoattack":
        for model, eps in falls_and_holds.items():
            rounds = settings.autoattack_runs
            yield _autoattack_contest(model, "Linf", eps, settings, rounds)

    else:
        for model in MODELS:
            for norm, eps in {"Linf": settings.eps, "L2": settings.l2_eps}.items():
                yield _autoattack_contest(model, norm, eps, settings, rounds=1)


def _pgd_settings(eps: float, settings: AttackBenchmarkSettings) -> PGDSettings:
    # the ratio of the usual 8/255 and 2/255
    return PGDSettings(
        eps, eps / 4, steps=PGD_STEPS, restarts=PGD_RESTARTS, batch_size=settings.batch_size
    )


def _pgd_contest(
    model: str, eps: float, settings: AttackBenchmarkSettings, runs: dict[str, LibraryRun]
) -> Contest:
    attack = f"PGD-{PGD_STEPS} × {PGD_RESTARTS} restarts, Linf, eps {eps:g}"
    passes = PGD_STEPS * PGD_RESTARTS
    return Contest(model, attack, runs, settings.images, settings.runs, passes)


def _autoattack_contest(
    model: str, norm: str, eps: float, settings: AttackBenchmarkSettings, rounds: int
) -> Contest:
    attack = f"AutoAttack-standard, {norm}, eps {eps:g}"
    runs = autoattack_runs(norm, eps, settings.batch_size)
    images = settings.autoattack_images
    return Contest(model, attack, runs, images, rounds, AUTOATTACK_PASSES)
