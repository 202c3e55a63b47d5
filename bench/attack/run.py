"""``ironmoe attack``: evaluate a model from anywhere under attacks by name. Every finished part is
kept."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ironmoe.attacks import Attack, RobustnessReport, evaluate
from ironmoe.attacks.engine.coupling import images_per_unit
from ironmoe.bench.attack.afterwards import Asked, ask_again
from ironmoe.bench.attack.attacked_images import (
    AttackedImages,
    attacked_images,
)
from ironmoe.bench.attack.failures import explained, too_small_a_budget
from ironmoe.bench.attack.meter import Meter, Stopwatch
from ironmoe.bench.attack.options import AttackOptions
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.parts import parts_of
from ironmoe.bench.attack.report import write_evaluation
from ironmoe.bench.attack.saved.checks import all_checks
from ironmoe.bench.attack.saved.found_images import INDEX, SaveError, check_form, save_found
from ironmoe.bench.attack.table import costs_table, heading, results_table
from ironmoe.bench.attack.words import words
from ironmoe.bench.common.processes import Processes, own_device, processes
from ironmoe.bench.common.radii import all_from_255
from ironmoe.bench.common.run_folder import NEEDED_BYTES, RunFolder, default_folder
from ironmoe.bench.models.expert_parallel import (
    check_processes,
    prepare_experts,
    share_out_experts,
)
from ironmoe.bench.models.load import load_model
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.memory import loading_device, save_memory
from ironmoe.bench.models.pixels import wanted_size
from ironmoe.bench.reports.tables import print_table

KEPT_BYTES = 4_000_000_000  # final images that take more are not kept, and no report shows them


def run_attack_command(options: AttackOptions, console: Console) -> Path:
    """Evaluate what is not decided yet, print the table, write the report.

    Under ``torchrun`` every process takes its share of the images, and the first prints and
    reports.

    Returns:
        The folder of the run.
    """
    check_processes(options.expert_parallel)
    device = own_device(options.device)
    with ExitStack() as shown:
        evaluation = _prepared(options, device, console, shown)
        evaluation.check_size()
        with processes(device) as group:
            evaluation.share_out(group, device)
            meter = group.first(lambda: evaluation.begin(group, console))
            watch = Stopwatch() if meter is None else shown.enter_context(meter)
            report = evaluation.run(watch)
            seconds = group.largest(watch.ended(report))
            reading = evaluation.reading(group)
            asked = None
            if options.expert_parallel > 1:  # no process can ask the model alone
                asked = evaluation.asked(report, meter, group)
        if meter is None:  # this is not the first process
            return evaluation.path
        asked = asked or evaluation.asked(report, meter, Processes())
        report.seconds = meter.finish(report, seconds)
        report.checks = all_checks(meter.folder, report)
        outcome = evaluation.outcome(report, meter, reading, asked)

    world = group.world, options.expert_parallel
    write_evaluation(evaluation.path, outcome, evaluation.settings, device, world)
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
        print_table(table, console)
    for line in words(outcome):
        console.print(line, highlight=False, markup=False)
    _say(folder.farewell, console)
    _say(f"Image by image: {folder.path}/images.csv, table: {folder.path}/table.tex", console)


def _prepared(
    options: AttackOptions, device: torch.device, console: Console, within: ExitStack
) -> "_Evaluation":
    """Load the model, match its classes to those of the data, make the attacks."""
    loaded = load_model(
        options.checkpoint,
        options.model_spec,
        loading_device(
            device, offload=options.offload_experts, expert_parallel=options.expert_parallel
        ),
        image_size=wanted_size(options.data.images, options.data.image_size, options.overrides),
        weights=options.weights,
        overrides=options.overrides,
    )
    memory = {"offload": options.offload_experts, "recompute": options.recompute}
    for line in save_memory(loaded.model, device, within, **memory):
        _say(line, console)
    images = attacked_images(
        options.data,
        loaded,
        options.suite,
        is_asked=options.overrides.resize is not None or options.overrides.crop is not None,
    )
    prepare_experts(loaded.model, loaded.name, options.expert_parallel)
    check_form(options.save_images, images.shape, options.suite.levels)
    attacks = options.suite.make(loaded.model)

    notes = images.notes
    if options.data.everything and images.name == loaded.facts.get("trained_on_data"):
        notes.append(
            "With --all on the data it was trained on, most images are ones the model has learnt "
            "from."
        )
    _say(f"Pixels: {images.pixels}", console)
    for note in notes:
        _say(note, console)

    settings = options.settings(loaded, images)
    return _Evaluation(
        options=options,
        loaded=loaded,
        attacks=attacks,
        images=images,
        settings=settings,
        path=options.out or default_folder(f"attack-{loaded.facts['stem']}", settings),
    )


class _Reading(NamedTuple):
    """What all processes together know of reading images.

    unread: number → why this image could not be read; waited: the longest time in seconds that the
    attacks of a process waited for images; rounded: by how much rounding to levels changed one.
    """

    unread: dict[int, str]
    waited: float
    rounded: float


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation, ready to begin.

    settings: what makes two runs the same run; path: of the folder.
    """

    options: AttackOptions
    loaded: LoadedModel
    attacks: dict[str, Attack]
    images: AttackedImages
    settings: dict[str, Any]
    path: Path

    @property
    def _final_bytes(self) -> int:
        """How many bytes the final images of all attacks take."""
        of_one = math.prod(self.images.shape) * torch.float32.itemsize
        return len(self.images) * of_one * len(self.attacks)

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

    def share_out(self, group: Processes, device: torch.device) -> None:
        """Let processes hold the experts together, where the user wants that."""
        share_out_experts(self.loaded.model, self.options.expert_parallel, device, group.world)

    def begin(self, group: Processes, console: Console) -> Meter:
        """Make or open the folder, in the first process."""
        needed = NEEDED_BYTES + (self._final_bytes if self._keeps_images else 0)
        parallel = {"processes": group.world, "expert_parallel": self.options.expert_parallel}
        folder = RunFolder(self.path, self.settings, needed, parallel=parallel)
        console.print(folder.greeting, highlight=False, markup=False)
        return Meter(
            folder,
            console,
            world=group.world // self.options.expert_parallel,
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
                    self.images.stream,
                    self.attacks,
                    eps=all_from_255(options.suite.eps_255),
                    batch_size=options.batch_size,
                    keep_adversarial="journal" if self._keeps_images else False,
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

    def reading(self, group: Processes) -> _Reading:
        """What became of the images that were read, by all processes."""
        stream = self.images.stream
        unread: dict[int, str] = {}
        for part in group.each(stream.unread):
            unread |= part
        rounded = group.largest(max(self.images.rounded, default=0.0))
        return _Reading(unread, group.largest(stream.waited), rounded)

    def asked(self, report: RobustnessReport, meter: Meter | None, group: Processes) -> Asked:
        """What the model is asked once more; all processes of the group do so in step."""
        return ask_again(
            self.loaded.model,
            self.options,
            self.images,
            report,
            keeps_images=self._keeps_images,
            meter=meter,
            group=group,
        )

    def outcome(
        self, report: RobustnessReport, meter: Meter, reading: _Reading, asked: Asked
    ) -> EvaluationOutcome:
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

        return EvaluationOutcome(
            name=self.loaded.name,
            report=report,
            suite=options.suite,
            parts=parts,
            images=self.images,
            margins=asked.margins,
            routing=asked.routing,
            unread=reading.unread,
            waited=reading.waited,
            remarks=self._remarks(reading),
            together=images_per_unit(self.loaded.model, options.batch_size),
        )

    def _remarks(self, reading: _Reading) -> list[str]:
        """What there is to say of the images when they have been read."""
        notes = [self.options.suite.rounding(reading.rounded)]
        if not self._keeps_images:
            notes.append(
                f"Final images would take {self._final_bytes / 1e9:.1f} GB and are not kept, so "
                "none are shown."
            )
        return [note for note in notes if note]
