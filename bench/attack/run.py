"""``ironmoe attack``: evaluate a model from anywhere under attacks by name. Every finished part is
kept."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from ironmoe.attacks import Attack, RobustnessReport, evaluate
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.bench.attack.class_matching import match_classes, other_data
from ironmoe.bench.attack.failures import explained, too_small_a_budget
from ironmoe.bench.attack.margins import margins_left
from ironmoe.bench.attack.meter import Meter, Stopwatch
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.parts import parts_of
from ironmoe.bench.attack.report import write_evaluation
from ironmoe.bench.attack.saved.found_images import INDEX, SaveError, check_form, save_found
from ironmoe.bench.attack.suite import DTYPES, Suite
from ironmoe.bench.attack.table import costs_table, heading, results_table
from ironmoe.bench.attack.words import words
from ironmoe.bench.common.data import DataError, ImageData
from ironmoe.bench.common.measure import AttackSettings, measure_routing
from ironmoe.bench.common.processes import Processes, own_device, processes
from ironmoe.bench.common.radii import all_from_255, exact
from ironmoe.bench.common.run_folder import NEEDED_BYTES, RunFolder, default_folder
from ironmoe.bench.common.versions import versions
from ironmoe.bench.models.load import load_model
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.moe.routing.routed_layers import routing_sites

KEPT_BYTES = 4_000_000_000  # final images that take more are not kept, and no report shows them


class AttackOptions(NamedTuple):
    """What the command line says.

    ``checks``, the budgets, ``save_images`` and ``on_bad`` change nothing that is found: a run may
    go on with others. ``passes`` and ``on_bad`` are those of ``evaluate``.
    """

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
    save_images: str | None = None
    passes: int | None = None
    on_bad: Literal["raise", "skip"] = "raise"
    weights: Path | None = None

    def settings(self, loaded: LoadedModel) -> dict[str, Any]:
        """What makes two runs the same run."""
        passes = {} if self.passes is None else {"passes": self.passes}
        return passes | {
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
            "attacks": self.suite.settings,
            "device": self.device.type,
            "ironmoe": versions()["ironmoe"],
        }


def run_attack_command(options: AttackOptions, console: Console) -> Path:
    """Evaluate what is not decided yet, print the table, write the report.

    Under ``torchrun`` every process takes its share of the images, and the first prints and
    reports.

    Returns:
        The folder of the run.
    """
    device = own_device(options.device)
    evaluation = _prepared(options, device, console)
    evaluation.check_size()

    with ExitStack() as shown:
        with processes(device) as group:
            meter = group.first(lambda: evaluation.begin(group, console))
            watch = Stopwatch() if meter is None else shown.enter_context(meter)
            report = evaluation.run(watch)
            seconds = group.largest(watch.ended(report))
        if meter is None:  # this is not the first process
            return evaluation.path
        report.seconds = meter.finish(report, seconds)
        outcome = evaluation.outcome(report, meter)

    write_evaluation(evaluation.path, outcome, evaluation.settings, device, group.world)
    _print(outcome, meter.folder, console)
    if options.save_images is not None:
        count = save_found(evaluation.path, outcome, options.save_images)
        _say(f"Adversarial images: {count}, listed in {evaluation.path / INDEX}", console)
    return evaluation.path


def _say(line: str, console: Console) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _print(outcome: EvaluationOutcome, folder: RunFolder, console: Console) -> None:
    for line in heading(outcome):
        console.print(line, highlight=False, markup=False)
    for table in (results_table(outcome), costs_table(outcome)):
        console.print(table)
    for line in words(outcome):
        console.print(line, highlight=False, markup=False)
    _say(folder.farewell, console)
    _say(f"Image by image: {folder.path}/images.csv, table: {folder.path}/table.tex", console)


def _prepared(options: AttackOptions, device: torch.device, console: Console) -> "_Evaluation":
    """Load the model, match its classes to those of the data, make the attacks."""
    data = options.data
    check_form(options.save_images, data.images.shape[1:], options.suite.levels)
    loaded = load_model(
        options.checkpoint,
        options.model_spec,
        device,
        image_size=(data.images.shape[-2], data.images.shape[-1]),
        weights=options.weights,
    )
    if options.checkpoint is not None and data.classes != loaded.classes:
        raise DataError(
            f"data {data.name!r} must have the classes of {options.checkpoint}, {loaded.classes}, "
            f"got {data.classes}; "
            f"{other_data(loaded, data)}"
        )

    matched = match_classes(loaded, data)
    attacks = options.suite.make(loaded.model)

    if options.everything and data.checksum == loaded.facts.get("trained_on"):
        console.print(
            "Note: with --all on the data it was trained on, most images are ones the model has "
            "learnt from."
        )

    rows = torch.arange(len(data.images)) if options.everything else data.split()[1]
    rows = rows[: options.images]
    images, rounded = options.suite.on_grid(data.images[rows])
    for note in filter(None, (matched.note, rounded)):
        console.print(note, highlight=False, markup=False)

    settings = options.settings(loaded)

    return _Evaluation(
        options=options,
        loaded=loaded,
        attacks=attacks,
        images=images,
        labels=matched.labels[rows],
        rows=rows,
        classes=matched.classes,
        matched=matched.note,
        settings=settings,
        path=options.out or default_folder(f"attack-{loaded.facts['stem']}", settings),
    )


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation, ready to begin.

    images (M, …), labels (M,): those to be attacked; rows (M,): where they are in the data;
    settings: what makes two runs the same run; path: of the folder.
    """

    options: AttackOptions
    loaded: LoadedModel
    attacks: dict[str, Attack]
    images: Tensor
    labels: Tensor
    rows: Tensor
    classes: list[str]
    matched: str
    settings: dict[str, Any]
    path: Path

    @property
    def _final_bytes(self) -> int:
        """How many bytes the final images of all attacks take."""
        return self.images.numel() * self.images.itemsize * len(self.attacks)

    @property
    def _keeps_images(self) -> bool:
        return self._final_bytes <= KEPT_BYTES

    def check_size(self) -> None:
        """SaveError: the images that are to be saved would not be kept."""
        if self.options.save_images is not None and not self._keeps_images:
            raise SaveError(
                f"--save-images needs final images of at most {KEPT_BYTES / 1e9:g} GB, got "
                f"{self._final_bytes / 1e9:.1f} GB; take fewer --attack-images or attacks"
            )

    def begin(self, group: Processes, console: Console) -> Meter:
        """Make or open the folder, in the first process."""
        needed = NEEDED_BYTES + (self._final_bytes if self._keeps_images else 0)
        folder = RunFolder(self.path, self.settings, needed)
        console.print(folder.greeting, highlight=False, markup=False)
        return Meter(
            folder,
            console,
            world=group.world,
            images=len(self.images),
            attacks=len(self.attacks),
        )

    def run(self, watch: Stopwatch) -> RobustnessReport:
        """Attack, and return what ``evaluate`` reports."""
        options = self.options
        with explained(self.loaded):
            try:
                return evaluate(
                    self.loaded.model,
                    (self.images, self.labels),
                    self.attacks,
                    eps=all_from_255(options.suite.eps_255),
                    batch_size=options.batch_size,
                    keep_adversarial=self._keeps_images,
                    checks=options.checks,
                    journal=self.path / "results" / "journal",
                    max_forwards=options.max_forwards,
                    max_seconds=options.max_seconds,
                    on_progress=watch,
                    passes=options.passes,
                    on_bad=options.on_bad,
                )
            finally:
                watch.save()

    def outcome(self, report: RobustnessReport, meter: Meter) -> EvaluationOutcome:
        """Everything that the report of the run is made from."""
        options = self.options
        parts = {name: parts_of(name, attack) for name, attack in self.attacks.items()}
        reached = len(report.clean_correct)

        if not reached:
            raise too_small_a_budget(
                parts,
                images=len(self.images),
                batch_size=options.batch_size,
                checks=options.checks,
                max_forwards=options.max_forwards,
                passes=report.passes,
                world=meter.world,
            )

        margins = None
        if self._keeps_images and reached == len(self.labels):
            margins = margins_left(self.loaded.model, report, self.labels, options.batch_size)
        return EvaluationOutcome(
            name=self.loaded.name,
            report=report,
            suite=options.suite,
            parts=parts,
            images=self.images,
            labels=self.labels,
            rows_of_data=self.rows,
            classes=self.classes,
            margins=margins,
            routing=self._routing(report, meter),
            matched=self.matched,
        )

    def _routing(self, report: RobustnessReport, meter: Meter) -> list[dict[str, Any]]:
        """What PGD at its full length does to the routing, at every eps.

        The list is empty for a dense model, where a budget ended the evaluation, and where no image
        is classified right.
        """
        if not routing_sites(self.loaded.model) or not report.complete:
            return []
        suite = self.options.suite

        measured: list[Any] = []
        for eps_255 in suite.eps_255:
            name = f"results/routing{exact(eps_255)}.json"
            if meter.folder.read(name) is None:
                meter.say(f"routing at eps {exact(eps_255)}/255")
                meter.folder.write(name, self._routing_at(eps_255))
            measured.append(meter.folder.read(name))

        meter.say("done")
        return measured if measured[0]["images"] else []

    def _routing_at(self, eps_255: float) -> dict[str, Any]:
        suite = self.options.suite
        settings = AttackSettings(
            norm=suite.norm,
            eps_255=suite.eps_255,
            steps=suite.pgd_steps,
            restarts=1,
            alpha=suite.alpha,
            images=self.options.images,
        )

        few = slice(min(settings.routing_images, self.options.batch_size))
        numbers, _ = measure_routing(
            self.loaded.model,
            self.images[few],
            self.labels[few],
            eps_255,
            settings,
            seed=suite.seed,
            attack_dtype=DTYPES[suite.dtype],
        )
        return numbers
