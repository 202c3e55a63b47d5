"""The demo: train a V-MoE and a dense ViT of equal compute, attack both, report. Every finished
part is kept."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ironmoe.bench.common.checkpoints import (
    ARCHITECTURES,
    architecture,
    count_flops,
    load_checkpoint,
    save_checkpoint,
)
from ironmoe.bench.common.data import ImageData
from ironmoe.bench.common.measure import (
    AttackSettings,
    measure_clean,
    measure_robust,
    measure_routing,
)
from ironmoe.bench.common.results import ModelResults, exact, finite, verdict
from ironmoe.bench.common.run_folder import RunFolder, write_atomically
from ironmoe.bench.common.train import Progress as TrainingProgress
from ironmoe.bench.common.train import Recipe, train
from ironmoe.bench.common.versions import versions
from ironmoe.bench.demo.report import write_report
from ironmoe.bench.demo.table import as_table
from ironmoe.moe import VMoE
from ironmoe.moe.routing.routed_layers import routing_sites

# checkpoints, optimiser state, pictures; a run of one seed takes about 10 MB
NEEDED_BYTES = 100_000_000


class Options(NamedTuple):
    """What the command line says, checked."""

    data: ImageData
    recipe: Recipe
    attack: AttackSettings
    seeds: list[int]
    device: torch.device
    autocast_dtype: torch.dtype | None
    out: Path | None

    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "data": self.data.name,
            "checksum": self.data.checksum,
            "skipped": self.data.skipped,
            "recipe": self.recipe._asdict(),
            "attack": self.attack._asdict(),
            "seeds": self.seeds,
            "device": self.device.type,
            "autocast_dtype": str(self.autocast_dtype),
            "ironmoe": versions()["ironmoe"],
        }


def default_folder(kind: str, settings: dict[str, Any]) -> Path:
    """runs/<kind>-<digest of the settings>: the same command finds its own folder again, another
    one never meets it."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{kind}-{digest}"


def run_demo(options: Options, console: Console) -> Path:
    """Do what is not done yet, print the table, write the report; returns the folder."""
    settings = options.settings()
    folder = RunFolder(
        options.out or default_folder(options.data.name, settings), settings, NEEDED_BYTES
    )
    console.print(
        f"{'Going on in' if folder.resumed else 'Writing to'} {folder.path}/",
        highlight=False,
        markup=False,
    )
    train_rows, test_rows = options.data.split()
    test_rows = test_rows[: options.attack.images]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARCHITECTURES}
    examples: dict[str, dict[str, Tensor]] = {}
    with progress_bars(console) as progress:
        for seed in options.seeds:
            for name in ARCHITECTURES:
                model, facts = _trained(name, seed, options, train_rows, folder, progress)
                images, labels = options.data.images[test_rows], options.data.labels[test_rows]
                label = f"{name} seed {seed}"
                measured, shown = measure_all(
                    model,
                    label,
                    images,
                    labels,
                    seed,
                    options.attack,
                    options.autocast_dtype,
                    folder,
                    progress,
                )
                runs[name].append(facts | measured)
                examples.setdefault(name, shown)
    models = [ModelResults(name, runs[name]) for name in ARCHITECTURES]
    finish(
        models,
        examples,
        folder,
        settings,
        f"V-MoE and ViT under attack: {options.data.name}",
        options.data.classes,
        options.attack,
        options.device,
        console,
    )
    return folder.path


def finish(
    models: list[ModelResults],
    examples: dict[str, dict[str, Tensor]],
    folder: RunFolder,
    settings: dict[str, Any],
    title: str,
    classes: list[str],
    attack: AttackSettings,
    device: torch.device,
    console: Console,
) -> None:
    """Table, words, report."""
    write_report(
        folder.path,
        models,
        examples,
        title=title,
        attack=attack.describe(),
        settings=settings,
        classes=classes,
        device=device,
        shown_eps=shown_eps(attack),
    )
    console.print(as_table(models, f"{title}\n{attack.describe()}"))
    for line in verdict(models):
        console.print(line, highlight=False, markup=False)
    console.print(
        f"Report: {folder.path}/report.html, numbers: {folder.path}/report.json",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def shown_eps(attack: AttackSettings) -> float:
    """The eps of the example images: the middle of the sweep."""
    return attack.eps_255[(len(attack.eps_255) - 1) // 2]


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _trained(
    name: str,
    seed: int,
    options: Options,
    train_rows: Tensor,
    folder: RunFolder,
    progress: Progress,
) -> tuple[VMoE, dict[str, Any]]:
    """The model from its checkpoint, or trained now (from its last finished epoch, if there is
    one)."""
    image_shape = tuple(options.data.images.shape[1:])
    file = folder.file(f"checkpoints/{_slug(name)}-seed{seed}.safetensors")
    if not file.exists():
        arguments = architecture(name, image_shape, len(options.data.classes))
        torch.manual_seed(seed)
        model = VMoE(**arguments).to(options.device)
        task = progress.add_task(f"train {name} seed {seed}", total=None, note="")

        def show(p: TrainingProgress) -> None:
            note = f"loss {p.loss:.3f}  accuracy {100 * p.accuracy:.1f} %"
            progress.update(task, total=p.steps, completed=p.step, note=note)

        state_file = file.with_suffix(".training")
        seconds = train(
            model, options.data.images[train_rows], options.data.labels[train_rows], options.recipe,
            seed=seed, state_file=state_file, autocast_dtype=options.autocast_dtype, on_step=show,
        )  # fmt: skip
        extra = {
            "name": name, "seed": seed, "seconds": seconds,
            "data": options.data.name, "checksum": options.data.checksum,
            "classes": options.data.classes,
        }  # fmt: skip
        write_atomically(file, save_checkpoint(model, arguments, extra))
        state_file.unlink(missing_ok=True)
    model, extra = load_checkpoint(file, options.device)
    return model, facts_of(model, image_shape) | {"seed": seed, "train_seconds": extra["seconds"]}


def facts_of(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    return {
        "flops": count_flops(model, image_shape),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure_all(
    model: nn.Module,
    label: str,
    images: Tensor,
    labels: Tensor,
    seed: int,
    settings: AttackSettings,
    attack_dtype: torch.dtype | None,
    folder: RunFolder,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Clean, robust at every eps, routing at every eps; each part is written when it is done and
    not measured twice."""
    task = progress.add_task(f"attack {label}", total=len(images), note="")
    key = _slug(label)
    clean = _kept(
        folder,
        f"results/{key}-clean.json",
        lambda: measure_clean(model, images, labels, settings.batch_size),
    )

    def measure() -> dict[str, Any]:
        journal = folder.file(f"results/{key}-journal")
        robust = measure_robust(
            model,
            images,
            labels,
            settings,
            seed,
            attack_dtype,
            journal,
            lambda decided: progress.update(task, completed=decided),
        )
        return {"attacks": robust}

    attacks, routing = _kept(folder, f"results/{key}-attacks.json", measure)["attacks"], []
    progress.update(task, completed=len(images))
    few = slice(settings.routing_images)
    has_experts = bool(routing_sites(model))
    # a dense model has examples to show, no routing
    for eps in settings.eps_255 if has_experts else [shown_eps(settings)]:
        name = f"results/{key}-routing{exact(eps)}.json"
        if folder.read(name) is None:
            progress.update(task, note=f"routing at eps {exact(eps)}/255")
            measured, shown = measure_routing(
                model, images[few], labels[few], eps, settings, seed, attack_dtype
            )
            write_atomically(
                folder.file(f"results/{key}-examples{exact(eps)}.safetensors"), save(shown)
            )
            folder.write(name, finite(measured))
        if has_experts:
            routing.append(folder.read(name))
    examples = load_file(
        folder.file(f"results/{key}-examples{exact(shown_eps(settings))}.safetensors")
    )
    progress.update(task, note="done")
    return clean | {"attacks": attacks, "routing": routing}, examples


def _kept(folder: RunFolder, name: str, measure: Any) -> dict[str, Any]:
    """The stored result, or a new one, stored."""
    if (stored := folder.read(name)) is not None:
        return stored
    folder.write(name, finite(measure()))
    return folder.read(name)  # type: ignore[return-value]


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")
