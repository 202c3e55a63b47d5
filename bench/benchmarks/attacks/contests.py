"""``ironmoe bench attacks``: several libraries run the same attack in turns. Verdicts are compared
before speeds."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ironmoe.attacks import Proportion
from ironmoe.bench.benchmarks.attacks.libraries import (
    PEERS,
    LibraryRun,
    PGDSettings,
    autoattack_runs,
    is_importable,
    pgd_runs,
)
from ironmoe.bench.benchmarks.attacks.models import MODELS, WIDE, trained_models
from ironmoe.bench.common.files import write_json
from ironmoe.bench.common.machine.hardware import describe_device
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.timing import samples_in_turns
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.reports.tables import terminal_table

# a ratio is printed if robust accuracies differ by at most this: starts are random
AGREES = 0.02
PARTS = ("pgd", "autoattack", "bf16", "reference")
IN_BFLOAT16 = "ironmoe, bf16 search"
CPU = torch.device("cpu")


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
    attacked; rounds: runs of each; base: the library that the others are compared with.
    """

    model: str
    attack: str
    runs: dict[str, LibraryRun]
    images: int
    rounds: int
    base: str = "ironmoe"


def run_bench_attacks(
    data: ImageData,
    settings: AttackBenchmarkSettings,
    parts: tuple[str, ...],
    folder: Path,
    out: Path | None,
    console: Console,
) -> None:
    """Train (or load) the models, run the parts, print and write each table as it comes.

    Args:
        parts: names out of PARTS.
        folder: where the trained models are kept.
        out: file for the rows, as JSON; it is written anew after each table.
    """
    torch.set_flush_denormal(True)
    contests = [contest for part in parts for contest in _contests(part, settings)]
    models = trained_models(
        list(dict.fromkeys(contest.model for contest in contests)),
        data,
        settings.eps,
        settings.epochs,
        folder,
        lambda name, epoch: console.print(f"{name}: epoch {epoch}", highlight=False),
    )

    test = data.split()[1]
    rows: list[dict[str, Any]] = []
    for contest in contests:
        x, y = data.images[test[: contest.images]], data.labels[test[: contest.images]]
        place = f"{contest.attack} on the {contest.model}"
        console.print(f"{place}, {len(y)} images …", highlight=False)
        found = _rows(contest, models[contest.model], x, y)
        console.print(_table(found, place, contest.base))
        rows += found
        if out is not None:
            write_json(out, _results(settings, data, rows))

    measured = {row["library"] for row in rows}
    absent = [name for name in PEERS if name not in measured and not is_importable(name)]
    if absent:
        console.print(f"Not installed here, so not measured: {', '.join(absent)}.", highlight=False)


def _results(
    settings: AttackBenchmarkSettings, data: ImageData, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of the JSON file."""
    return {
        "settings": settings._asdict(),
        "data": data.name,
        "versions": versions(),
        "device": describe_device(CPU),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def _contests(part: str, settings: AttackBenchmarkSettings) -> Iterator[Contest]:
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
                "ironmoe": pgd_runs(pgd)["ironmoe"],
                IN_BFLOAT16: pgd_runs(pgd, torch.bfloat16)["ironmoe"],
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
    return PGDSettings(eps, eps / 4, steps=40, restarts=5, batch_size=settings.batch_size)


def _pgd_contest(
    model: str, eps: float, settings: AttackBenchmarkSettings, runs: dict[str, LibraryRun]
) -> Contest:
    attack = f"PGD-40 × 5 restarts, Linf, eps {eps:g}"
    return Contest(model, attack, runs, settings.images, settings.runs)


def _autoattack_contest(
    model: str, norm: str, eps: float, settings: AttackBenchmarkSettings, rounds: int
) -> Contest:
    attack = f"AutoAttack-standard, {norm}, eps {eps:g}"
    runs = autoattack_runs(norm, eps, settings.batch_size)
    return Contest(model, attack, runs, settings.autoattack_images, rounds)


def _rows(contest: Contest, model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """A row for each library. They take turns, and their verdicts are compared."""
    held: dict[str, Tensor] = {}

    def attack(library: str) -> None:
        held[library] = contest.runs[library](model, x, y)

    turns = {library: partial(attack, library) for library in contest.runs}
    samples = samples_in_turns(turns, CPU, contest.rounds, warmup=0)
    seconds = {
        library: median(sample.ms for sample in found) / 1e3 for library, found in samples.items()
    }

    rows = []
    for library in contest.runs:
        ours, theirs = held[contest.base], held[library]
        difference = (int(ours.sum()) - int(theirs.sum())) / len(y)
        ratio = seconds[library] / seconds[contest.base]
        rows.append(
            {
                "attack": contest.attack,
                "model": contest.model,
                "library": library,
                "robust": Proportion(int(theirs.sum()), len(y)).as_dict(),
                "agreement": float((ours == theirs).double().mean()),
                "seconds": seconds[library],
                "runs": contest.rounds,
                "ratio": ratio if abs(difference) <= AGREES else None,
                "compared_with": contest.base,
            }
        )

    return rows


def _table(rows: list[dict[str, Any]], title: str, base: str) -> Table:
    columns = ("library", "robust accuracy", "same verdict", "seconds", f"time / {base}")
    table = terminal_table(columns, title=title)
    for row in rows:
        share = Proportion(row["robust"]["count"], row["robust"]["total"])
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else "verdicts differ"
        table.add_row(
            row["library"],
            str(share),
            f"{100 * row['agreement']:.1f} %",
            f"{row['seconds']:.2f}",
            ratio,
        )

    return table
