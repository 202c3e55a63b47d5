"""The demo: train a V-MoE and a dense ViT of equal compute, attack both, report. Every finished
part is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ironmoe.bench.common.checkpoints import (
    ARCHITECTURES,
    architecture,
    count_flops,
    load_checkpoint,
    save_checkpoint,
)
from ironmoe.bench.common.files import slug, write_atomically
from ironmoe.bench.common.loop.initial import paired_model
from ironmoe.bench.common.machine.versions import versions
from ironmoe.bench.common.measure import (
    AttackSettings,
    measure_clean,
    measure_robust,
    measure_routing,
)
from ironmoe.bench.common.progress_bars import progress_bars
from ironmoe.bench.common.radii import exact
from ironmoe.bench.common.run_folder import NEEDED_BYTES, RunFolder, default_folder
from ironmoe.bench.common.train import Recipe, TrainingProgress, train
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.demo.report import write_demo_report
from ironmoe.bench.demo.table import as_table, routing_table
from ironmoe.bench.demo.verdict import verdict
from ironmoe.bench.reports.model_results import ModelResults
from ironmoe.bench.reports.tables import print_table
from ironmoe.moe import VMoE
from ironmoe.moe.routing.routed_layers import routing_sites

Numbers = dict[str, Any]  # numbers by name, as they stand in report.json


class DemoOptions(NamedTuple):
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
            "initial_weights": "drawn for each module by its name and the seed",
            "ironmoe": versions()["ironmoe"],
        }


def run_demo(options: DemoOptions, console: Console) -> Path:
    """Do what is not done yet, print the table, write the report.

    Returns:
        The folder of the run.
    """
    options.data.split()  # refuses a class with one image, before a folder is made
    settings = options.settings()
    path = options.out or default_folder(options.data.name, settings)
    folder = RunFolder(path, settings, NEEDED_BYTES)
    console.print(folder.greeting, highlight=False, markup=False)

    runs: dict[str, list[Numbers]] = {name: [] for name in ARCHITECTURES}
    examples: dict[str, dict[str, Tensor]] = {}
    with progress_bars(console) as bars:
        demo = _Demo(options, folder, bars)
        for seed in options.seeds:
            for name in ARCHITECTURES:
                model, facts = demo.trained(name, seed)
                measured, shown = demo.measured(model, f"{name} seed {seed}", seed)
                runs[name].append(facts | measured)
                examples.setdefault(name, shown)

    models = [ModelResults(name, runs[name]) for name in ARCHITECTURES]
    _finish(models, examples, options, folder, console)
    return folder.path


def _finish(
    models: list[ModelResults],
    examples: dict[str, dict[str, Tensor]],
    options: DemoOptions,
    folder: RunFolder,
    console: Console,
) -> None:
    """Write the report, print the table and the words."""
    title = f"V-MoE and ViT under attack: {options.data.name}"
    attack = options.attack.describe()
    write_demo_report(
        folder.path,
        models,
        examples,
        title=title,
        attack=attack,
        settings=options.settings(),
        classes=options.data.classes,
        device=options.device,
    )

    print_table(as_table(models, f"{title}\n{attack}"), console)
    if routing := routing_table(models):
        print_table(routing, console)
    for line in verdict(models):
        console.print(line, highlight=False, markup=False)

    console.print(folder.farewell, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class _Demo:
    """The parts of one run. A part that the folder holds already is not done again."""

    options: DemoOptions
    folder: RunFolder
    bars: Progress

    def trained(self, name: str, seed: int) -> tuple[VMoE, Numbers]:
        """The model, and what its checkpoint says of it. It is trained now if there is no
        checkpoint."""
        file = self.folder.file(f"checkpoints/{slug(name)}-seed{seed}.safetensors")
        if not file.exists():
            self._train(name, seed, file)

        model, extra = load_checkpoint(file, self.options.device)
        facts = {
            "flops": count_flops(model, self._image_shape),
            "parameters": sum(p.numel() for p in model.parameters()),
            "seed": seed,
            "train_seconds": extra["seconds"],
        }
        return model, facts

    def _train(self, name: str, seed: int, file: Path) -> None:
        """Train from the last finished epoch, if there is one, and write the checkpoint."""
        self.folder.worked()
        data = self.options.data
        arguments = architecture(name, self._image_shape, len(data.classes))
        model = paired_model(arguments, seed).to(self.options.device)
        task = self.bars.add_task(_label(f"train {name} seed {seed}"), total=None, note="")

        def show(p: TrainingProgress) -> None:
            note = f"loss {p.loss:.3f}  accuracy {100 * p.accuracy:.1f} %"
            self.bars.update(task, total=p.steps, completed=p.step, note=note)

        rows, _ = data.split()
        state_file = file.with_suffix(".training")
        seconds = train(
            model,
            data.images[rows],
            data.labels[rows],
            self.options.recipe,
            seed=seed,
            state_file=state_file,
            autocast_dtype=self.options.autocast_dtype,
            on_step=show,
        )

        extra = {
            "name": name,
            "seed": seed,
            "seconds": seconds,
            "data": data.name,
            "checksum": data.checksum,
            "classes": data.classes,
        }
        write_atomically(file, save_checkpoint(model, arguments, extra))
        state_file.unlink(missing_ok=True)

    def measured(
        self, model: nn.Module, label: str, seed: int
    ) -> tuple[Numbers, dict[str, Tensor]]:
        """Measure clean accuracy, robust accuracy and routing at every eps.

        Returns:
            (numbers, images that fell)
        """
        settings = self.options.attack
        images, labels = self._test_images()
        task = self.bars.add_task(_label(f"attack {label}"), total=len(images), note="")
        key = slug(label)
        examples_file = self.folder.file(f"results/{key}-examples.safetensors")

        def measure_attacks() -> Numbers:
            robust, fallen = measure_robust(
                model,
                images,
                labels,
                settings,
                seed=seed,
                attack_dtype=self.options.autocast_dtype,
                journal=self.folder.file(f"results/{key}-journal"),
                on_images=lambda decided: self.bars.update(task, completed=decided),
            )
            write_atomically(examples_file, save(fallen))
            return robust

        clean = self._kept(
            f"results/{key}-clean.json",
            lambda: measure_clean(model, images, labels, settings.batch_size),
        )
        attacks = self._kept(f"results/{key}-attacks.json", measure_attacks)
        self.bars.update(task, completed=len(images))

        routing = []
        for eps_255 in settings.eps_255 if routing_sites(model) else ():
            self.bars.update(task, note=f"routing at eps {exact(eps_255)}/255")
            routing.append(self._routing(model, key, eps_255, seed))

        self.bars.update(task, note="done")
        return clean | attacks | {"routing": routing}, load_file(examples_file)

    def _routing(self, model: nn.Module, key: str, eps_255: float, seed: int) -> Numbers:
        """The routing at one eps."""
        settings = self.options.attack
        images, labels = self._test_images()
        few = slice(settings.routing_images)

        def measure() -> Numbers:
            return measure_routing(
                model,
                images[few],
                labels[few],
                eps_255,
                settings,
                seed=seed,
                attack_dtype=self.options.autocast_dtype,
            )

        return self._kept(f"results/{key}-routing{exact(eps_255)}.json", measure)

    def _kept(self, name: str, measure: Callable[[], Numbers]) -> Numbers:
        """The stored result; or a new one, which is stored."""
        stored: Numbers | None = self.folder.read(name)
        if stored is None:
            self.folder.worked()
            self.folder.write(name, measure())
            stored = self.folder.read(name)
        assert stored is not None
        return stored

    def _test_images(self) -> tuple[Tensor, Tensor]:
        data = self.options.data
        rows = data.split()[1][: self.options.attack.images]
        return data.images[rows], data.labels[rows]

    @property
    def _image_shape(self) -> tuple[int, ...]:
        return tuple(self.options.data.images.shape[1:])


def _label(text: str) -> str:
    """The text, padded so that the bars of several tasks stand below each other."""
    return f"{text:<20}"
