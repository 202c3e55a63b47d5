"""``ironmoe attack``: a model from anywhere, evaluated under attacks by name; every finished part is kept."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import progress as rich_progress
from rich.console import Console
from torch import Tensor, nn

from ironmoe.attacks import Attack, Progress, RobustnessReport, evaluate
from ironmoe.attacks.checksum import model_digest
from ironmoe.attacks.coupling import images_per_unit
from ironmoe.bench.attack_suite import DTYPES, Suite, SuiteError
from ironmoe.bench.data import DataError, ImageData
from ironmoe.bench.demo import NEEDED_BYTES, default_folder, progress_bars
from ironmoe.bench.evaluation_outcome import Outcome, margins_left
from ironmoe.bench.evaluation_report import results_table, write_evaluation
from ironmoe.bench.measure import AttackSettings, measure_routing
from ironmoe.bench.model_source import LoadedModel, load_model, match_classes
from ironmoe.bench.processes import own_device, processes
from ironmoe.bench.run_folder import RunFolder
from ironmoe.bench.summary import finite
from ironmoe.bench.versions import versions
from ironmoe.moe.sites import routing_sites

SAVE_SECONDS = 5.0  # between notes of the time spent
KEPT_BYTES = 4_000_000_000  # of final images: more are not kept, and the report shows none


class Options(NamedTuple):
    """What the command line says. ``checks`` and the budgets change nothing that is found: a run may go on with others."""

    checkpoint: Path | None
    model_spec: str | None
    data: ImageData
    everything: bool
    suite: Suite
    images: int
    batch_size: int
    device: torch.device
    out: Path | None
    checks: bool = True
    max_seconds: float | None = None
    max_forwards: int | None = None

    def settings(self, loaded: LoadedModel) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "model": self.model_spec or str(self.checkpoint),
            "name": loaded.name,
            "facts": loaded.facts,
            "weights": model_digest(loaded.model),
            "data": self.data.name,
            "checksum": self.data.checksum,
            "skipped": self.data.skipped,
            "all": self.everything,
            "images": self.images,
            "together": images_per_unit(loaded.model, self.batch_size),
            "attacks": self.suite._asdict(),
            "device": self.device.type,
            "ironmoe": versions()["ironmoe"],
        }


def run_attack(options: Options, console: Console) -> Path:
    """Evaluate what is not decided yet, print the table, write the report; returns the folder.

    Under ``torchrun`` every process takes its share of the images, and the first prints and reports.
    """
    data, suite = options.data, options.suite
    device = own_device(options.device)
    loaded = load_model(options.checkpoint, options.model_spec, data, device)
    if options.checkpoint is not None and data.classes != loaded.classes:
        raise DataError(
            f"data {data.name!r} must have the classes of {options.checkpoint}, {loaded.classes}, got {data.classes}"
        )
    labels, classes = match_classes(loaded, data)
    attacks = suite.make(loaded.model)
    if options.everything and data.checksum == loaded.facts.get("trained_on"):
        console.print("Note: with --all on the data it was trained on, most images are ones the model has learnt from.")
    settings = options.settings(loaded)
    rows = (torch.arange(len(data.images)) if options.everything else data.split()[1])[: options.images]
    images, labels = data.images[rows], labels[rows]
    image_bytes = images.numel() * images.itemsize * len(attacks)  # the final images
    keep = image_bytes <= KEPT_BYTES
    path = options.out or default_folder(f"attack-{loaded.facts['stem']}", settings)
    with progress_bars(console) as bars:
        with processes(device) as group:
            meter = None
            if group.is_first:
                folder = RunFolder(path, settings, NEEDED_BYTES + keep * image_bytes)
                console.print(f"{'Going on in' if folder.resumed else 'Writing to'} {path}/", highlight=False)
                meter = _Meter(folder, group.world, bars, len(images) * len(attacks))
            group.wait()  # for the folder
            report = _evaluated(loaded.model, (images, labels), attacks, options, keep, path / "results" / "journal", meter)
        if meter is None:
            return path
        if not len(report.clean_correct):
            raise SuiteError("--max-seconds or --max-forwards ended the evaluation before it began; give it more")
        seconds = meter.finish(report)
        whole = len(report.clean_correct) == len(labels)
        margins = margins_left(loaded.model, report, labels, options.batch_size) if keep and whole else None
        routing = _routing(loaded.model, images, labels, options, report, meter)
    outcome = Outcome(loaded.name, report, suite, seconds, images, labels, classes, margins, routing)
    write_evaluation(path, outcome, settings, device, group.world)
    console.print(results_table(outcome))
    for line in outcome.words():
        console.print(line, highlight=False)
    console.print(f"Report: {path}/report.html, numbers: {path}/report.json", highlight=False, soft_wrap=True)
    return path


def _evaluated(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    attacks: dict[str, Attack],
    options: Options,
    keep: bool,
    journal: Path,
    meter: "_Meter | None",
) -> RobustnessReport:
    try:
        return evaluate(
            model,
            data,
            attacks,
            eps=[eps / 255 for eps in options.suite.eps_255],
            batch_size=options.batch_size,
            keep_adversarial=keep,
            checks=options.checks,
            journal=journal,
            max_forwards=options.max_forwards,
            max_seconds=options.max_seconds,
            on_progress=meter,
        )
    except ValueError as error:  # what the model says, or what is in the folder
        raise SuiteError(str(error)) from error
    finally:
        if meter is not None:
            meter.save()


class _Meter:
    """The progress bar, and the seconds of all runs in a folder."""

    def __init__(self, folder: RunFolder, world: int, bars: rich_progress.Progress, pairs: int) -> None:
        self.folder, self.world, self.bars = folder, world, bars
        self.task = bars.add_task("attack", total=pairs, note="")
        self.began = self.saved = time.monotonic()
        self.before = float((folder.read("results/seconds.json") or {}).get("seconds", 0.0))
        self.told = False

    def __call__(self, progress: Progress) -> None:
        """Of the other processes it is supposed that they are as far."""
        decided, now = progress.decided * self.world, time.monotonic()
        if progress.total is not None:
            decided = min(decided, progress.total)
        if not self.told:
            self.bars.reset(self.task, completed=decided)  # what was decided before says nothing of the time left
            self.told = True
        rate = progress.images_per_second * self.world
        self.bars.update(self.task, completed=decided, note=f"{rate:.1f} images/s")
        if now - self.saved > SAVE_SECONDS:
            self.save()

    def say(self, note: str) -> None:
        self.bars.update(self.task, note=note)

    def finish(self, report: RobustnessReport) -> float:
        """The bar as it ends; the seconds of all runs."""
        decided = sum(int(summary.decided.sum()) for summary in report.attacks.values())
        self.bars.update(self.task, completed=decided, note="done" if report.complete else "budget spent")
        return self.save()

    def save(self) -> float:
        """Note and give the seconds so far."""
        self.saved = time.monotonic()
        seconds = self.before + self.saved - self.began
        self.folder.write("results/seconds.json", {"seconds": seconds})
        return seconds


def _routing(
    model: nn.Module, images: Tensor, labels: Tensor, options: Options, report: RobustnessReport, meter: _Meter
) -> list[dict[str, Any]]:
    """What PGD at its full length does to the routing at every eps. Nothing of a dense model, where a budget ended the evaluation, or
    without an image that is classified right."""
    if not routing_sites(model) or not report.complete:
        return []
    suite, measured = options.suite, []
    settings = AttackSettings(suite.norm, suite.eps_255, suite.pgd_steps, 1, suite.alpha, options.images)
    few = slice(min(settings.routing_images, options.batch_size))
    for eps in suite.eps_255:
        name = f"results/routing{eps:g}.json"
        numbers = meter.folder.read(name)
        if numbers is None:
            meter.say(f"routing at eps {eps:g}/255")
            numbers = finite(
                measure_routing(model, images[few], labels[few], eps, settings, suite.seed, DTYPES[suite.dtype])[0]
            )
            meter.folder.write(name, numbers)
        measured.append(numbers)
    meter.say("done")
    return measured if measured[0]["images"] else []
