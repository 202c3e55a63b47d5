"""``ironmoe bench attacks``: the same attack by several libraries, in turns, verdicts compared
before speeds."""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ironmoe.attacks import Proportion
from ironmoe.bench.benchmarks.attack_models import MODELS, WIDE, trained_models
from ironmoe.bench.benchmarks.attack_peers import PGDSettings, Run, autoattack_runs, pgd_runs
from ironmoe.bench.common.data import ImageData
from ironmoe.bench.common.run_folder import write_atomically
from ironmoe.bench.common.versions import describe_device, versions

# share of images by which robust accuracies may differ for a ratio to be printed: starts are random
AGREES = 0.02
PARTS = ("pgd", "autoattack", "bf16", "reference")
PEERS = ("torchattacks", "foolbox", "adv-lib", "official")


class Settings(NamedTuple):
    """eps of the pixel range: that of the robust model's training, and those at which an undefended
    model falls and mostly holds; images attacked; runs of each, the median counts; batch_size for
    everybody."""

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


def run_bench_attacks(
    data: ImageData,
    settings: Settings,
    parts: tuple[str, ...],
    folder: Path,
    out: Path | None,
    console: Console,
) -> None:
    """Train (or load) the models, run the parts, print the tables, write the rows."""
    torch.set_flush_denormal(True)
    contests = [contest for part in parts for contest in _contests(part, settings)]
    models = trained_models(
        list(dict.fromkeys(contest[0] for contest in contests)),
        data,
        settings.eps,
        settings.epochs,
        folder,
        lambda name, epoch: console.print(f"{name}: epoch {epoch}", highlight=False),
    )
    test = data.split()[1]
    rows: list[dict[str, Any]] = []
    for name, label, runs, count, repeats, base in contests:
        x, y = data.images[test[:count]], data.labels[test[:count]]
        console.print(f"{label} on the {name}, {len(y)} images …", highlight=False)
        rows += _contest(models[name], x, y, runs, repeats, base, {"attack": label, "model": name})
        console.print(_table(rows[-len(runs) :]))
    absent = [name for name in PEERS if not any(row["library"] == name for row in rows)]
    if absent:
        console.print(f"Not installed here, so not measured: {', '.join(absent)}.", highlight=False)
    result = {
        "settings": settings._asdict(),
        "data": data.name,
        "versions": versions(),
        "device": describe_device(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    if out is not None:
        write_atomically(out, json.dumps(result, indent=1))


def _contests(part: str, s: Settings) -> Iterator[tuple[str, str, dict[str, Run], int, int, str]]:
    """(model, label, runs by library, images, repeats, the run that others are compared with)."""
    falls_and_holds = {"V-MoE": s.large_eps, "robust V-MoE": s.eps}
    if part == "pgd":
        for model, eps in falls_and_holds.items():
            # the ratio of the usual 8/255 and 2/255
            pgd = PGDSettings(eps, eps / 4, 40, 5, s.batch_size)
            yield (
                model,
                f"PGD-40 × 5 restarts, Linf, eps {eps:g}",
                pgd_runs(pgd),
                s.images,
                s.runs,
                "ironmoe",
            )
    elif part == "bf16":
        for model, eps in [("robust V-MoE", s.eps), (WIDE, s.large_eps), (WIDE, s.small_eps)]:
            pgd, base = PGDSettings(eps, eps / 4, 40, 5, s.batch_size), "ironmoe, bf16 search"
            runs = {
                "ironmoe": pgd_runs(pgd)["ironmoe"],
                base: pgd_runs(pgd, torch.bfloat16)["ironmoe"],
            }
            yield model, f"PGD-40 × 5 restarts, Linf, eps {eps:g}", runs, s.images, s.runs, base
    elif part == "autoattack":
        for model, eps in falls_and_holds.items():
            runs = autoattack_runs("Linf", eps, s.batch_size)
            yield (
                model,
                f"AutoAttack-standard, Linf, eps {eps:g}",
                runs,
                s.autoattack_images,
                s.autoattack_runs,
                "ironmoe",
            )
    else:
        for model in MODELS:
            for norm, eps in {"Linf": s.eps, "L2": s.l2_eps}.items():
                runs = autoattack_runs(norm, eps, s.batch_size)
                yield (
                    model,
                    f"AutoAttack-standard, {norm}, eps {eps:g}",
                    runs,
                    s.autoattack_images,
                    1,
                    "ironmoe",
                )


def _contest(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    runs: dict[str, Run],
    repeats: int,
    base: str,
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Each library ``repeats`` times, in a new random order every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    held: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name in random.sample(list(runs), len(runs)):
            start = time.perf_counter()
            held[name] = runs[name](model, x, y)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name in runs:
        difference = (int(held[base].sum()) - int(held[name].sum())) / len(y)
        agreement = float((held[base] == held[name]).double().mean())
        equal = abs(difference) <= AGREES
        rows.append(
            facts
            | {
                "library": name,
                "robust": Proportion(int(held[name].sum()), len(y)).as_dict(),
                "agreement": agreement,
                "seconds": median(seconds[name]),
                "runs": repeats,
                "ratio": median(seconds[name]) / median(seconds[base]) if equal else None,
                "compared_with": base,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{rows[0]['attack']} on the {rows[0]['model']}", title_justify="left")
    for column in (
        "library",
        "robust accuracy",
        "same verdict",
        "seconds",
        f"time / {rows[0]['compared_with']}",
    ):
        table.add_column(column, justify="left" if column == "library" else "right")
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
