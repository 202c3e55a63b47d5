"""``ironmoe attack``: a model from anywhere, evaluated under attacks by name; every finished part
is kept."""

import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from ironmoe.attacks import Attack, RobustnessReport, evaluate
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.attacks.evaluation.journal import JournalError
from ironmoe.attacks.evaluation.model_checks import passes_of_checks
from ironmoe.bench.attack.meter import Meter, Watch
from ironmoe.bench.attack.model_source import LoadedModel, load_model, match_classes, other_data
from ironmoe.bench.attack.outcome import Outcome, margins_left
from ironmoe.bench.attack.parts import parts_of
from ironmoe.bench.attack.report import write_evaluation
from ironmoe.bench.attack.suite import DTYPES, Suite, SuiteError
from ironmoe.bench.attack.table import costs_table, heading, results_table
from ironmoe.bench.common.data import DataError, ImageData
from ironmoe.bench.common.errors import told
from ironmoe.bench.common.measure import AttackSettings, measure_routing
from ironmoe.bench.common.processes import own_device, processes
from ironmoe.bench.common.results import exact, finite
from ironmoe.bench.common.run_folder import RunFolder
from ironmoe.bench.common.versions import versions
from ironmoe.bench.demo.run import NEEDED_BYTES, default_folder
from ironmoe.moe.checkpoints.read import CheckpointError
from ironmoe.moe.routing.routed_layers import routing_sites

KEPT_BYTES = 4_000_000_000  # of final images: more are not kept, and the report shows none


class Options(NamedTuple):
    """What the command line says. ``checks`` and the budgets change nothing that is found: a run
    may go on with others."""

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
            "model": loaded.identity,
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

    Under ``torchrun`` every process takes its share of the images, and the first prints and
    reports.
    """
    data, suite = options.data, options.suite
    device = own_device(options.device)
    loaded = load_model(options.checkpoint, options.model_spec, data, device)
    if options.checkpoint is not None and data.classes != loaded.classes:
        raise DataError(
            f"data {data.name!r} must have the classes of {options.checkpoint}, {loaded.classes}, "
            f"got {data.classes}; "
            f"{other_data(loaded, data)}"
        )
    matched = match_classes(loaded, data)
    attacks = suite.make(loaded.model)
    if options.everything and data.checksum == loaded.facts.get("trained_on"):
        console.print(
            "Note: with --all on the data it was trained on, most images are ones the model has "
            "learnt from."
        )
    if matched.note:
        console.print(matched.note, highlight=False, markup=False)
    settings = options.settings(loaded)
    rows = (torch.arange(len(data.images)) if options.everything else data.split()[1])[
        : options.images
    ]
    images, labels = data.images[rows], matched.labels[rows]
    image_bytes = images.numel() * images.itemsize * len(attacks)  # the final images
    keep = image_bytes <= KEPT_BYTES
    path = options.out or default_folder(f"attack-{loaded.facts['stem']}", settings)

    def begin() -> Meter:
        folder = RunFolder(path, settings, NEEDED_BYTES + keep * image_bytes)
        console.print(
            f"{'Going on in' if folder.resumed else 'Writing to'} {path}/",
            highlight=False,
            markup=False,
        )
        return Meter(folder, console, group.world, len(images), len(attacks))

    with ExitStack() as shown:
        with processes(device) as group:
            meter = group.first(begin)
            watch = shown.enter_context(meter) if meter is not None else Watch()
            report = _evaluated(
                loaded,
                (images, labels),
                attacks,
                options,
                keep,
                path / "results" / "journal",
                watch,
            )
            seconds = group.largest(watch.ended(report))
        if meter is None:
            return path
        report.seconds = meter.finish(report, seconds)
        if not len(report.clean_correct):
            raise SuiteError(_too_small(options, len(images), attacks, group.world))
        whole = len(report.clean_correct) == len(labels)
        margins = (
            margins_left(loaded.model, report, labels, options.batch_size)
            if keep and whole
            else None
        )
        routing = _routing(loaded.model, images, labels, options, report, meter)
    parts = {name: parts_of(name, attack) for name, attack in attacks.items()}
    outcome = Outcome(
        loaded.name, report, suite, parts, images, labels, rows, matched.classes, margins, routing,
        matched.note
    )  # fmt: skip
    write_evaluation(path, outcome, settings, device, group.world)
    for line in heading(outcome):
        console.print(line, highlight=False, markup=False)
    for table in (results_table(outcome), costs_table(outcome)):
        console.print(table)
    for line in outcome.words():
        console.print(line, highlight=False, markup=False)
    console.print(
        f"Report: {path}/report.html, numbers: {path}/report.json",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return path


def _evaluated(
    loaded: LoadedModel,
    data: tuple[Tensor, Tensor],
    attacks: dict[str, Attack],
    options: Options,
    keep: bool,
    journal: Path,
    watch: Watch,
) -> RobustnessReport:
    """What ``evaluate`` says; what goes wrong with the model or the folder in one line."""
    try:
        return evaluate(
            loaded.model,
            data,
            attacks,
            eps=[eps / 255 for eps in options.suite.eps_255],
            batch_size=options.batch_size,
            keep_adversarial=keep,
            checks=options.checks,
            journal=journal,
            max_forwards=options.max_forwards,
            max_seconds=options.max_seconds,
            on_progress=watch,
        )
    except JournalError as error:
        raise SuiteError(str(error)) from error
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [frame.f_globals.get("__name__", "") for frame in frames]
        if any(module.startswith("torch.distributed") for module in modules):
            raise SuiteError(
                "another process ended. What was finished is saved; the same command goes on from "
                "there"
            ) from error
        if isinstance(error, ValueError) and modules[-1].startswith("ironmoe."):
            hint = "; --attack square needs no gradients" if "without a graph" in str(error) else ""
            raise SuiteError(f"{loaded.source}: {error}{hint}") from error
        if any(frame.f_locals.get("self") is loaded.model for frame in frames):
            raise CheckpointError(f"{loaded.source} failed under attack: {told(error)}") from error
        raise
    finally:
        if isinstance(watch, Meter):
            watch.save()


def _too_small(options: Options, images: int, attacks: dict[str, Attack], world: int) -> str:
    """What to say of a budget that did not suffice for the clean images of the first batch."""
    message = "--max-seconds or --max-forwards ended the evaluation before it began; give it more"
    if options.max_forwards is None:
        return message
    batch = min(options.batch_size, images)
    first = batch * (
        1 + min(part.eot for name, attack in attacks.items() for part in parts_of(name, attack))
    )
    looks = (
        passes_of_checks(batch)
        if options.checks and options.max_forwards >= world * passes_of_checks(batch)
        else 0
    )
    needs = " and ".join(
        filter(None, (f"{looks} for the checks" * bool(looks), f"{batch} for its clean images"))
    )
    each = "" if world == 1 else ", in each of the processes, which share the budget"
    return (
        f"--max-forwards {options.max_forwards} ended the evaluation before it began: the first "
        f"batch, of {batch} images, needs {needs}, and "
        f"{first} more for a first question to the model{each}; give it more, or a smaller "
        "--batch-size"
    )


def _routing(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    options: Options,
    report: RobustnessReport,
    meter: Meter,
) -> list[dict[str, Any]]:
    """What PGD at its full length does to the routing at every eps. Nothing of a dense model, where
    a budget ended the evaluation, or without an image that is classified right."""
    if not routing_sites(model) or not report.complete:
        return []
    suite, measured = options.suite, []
    settings = AttackSettings(
        suite.norm, suite.eps_255, suite.pgd_steps, 1, suite.alpha, options.images
    )
    few = slice(min(settings.routing_images, options.batch_size))
    for eps in suite.eps_255:
        name = f"results/routing{exact(eps)}.json"
        numbers = meter.folder.read(name)
        if numbers is None:
            meter.say(f"routing at eps {exact(eps)}/255")
            numbers = finite(
                measure_routing(
                    model, images[few], labels[few], eps, settings, suite.seed, DTYPES[suite.dtype]
                )[0]
            )
            meter.folder.write(name, numbers)
        measured.append(numbers)
    meter.say("done")
    return measured if measured[0]["images"] else []
