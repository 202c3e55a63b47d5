"""``ironmoe train``: train, choose weights, attack them, report. Every finished epoch is kept."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ironmoe.attacks.training import (
    TRAINING_METHODS,
    NonFiniteLoss,
    OverfittingGuard,
    TrainingMethod,
)
from ironmoe.bench.attack.attacked_images import ImageOptions
from ironmoe.bench.attack.options import AttackOptions
from ironmoe.bench.attack.run import run_attack_command
from ironmoe.bench.attack.suite import Suite
from ironmoe.bench.common.files import slug, write_atomically, write_json
from ironmoe.bench.common.processes import Processes, own_device, processes
from ironmoe.bench.common.radii import exact, to_255
from ironmoe.bench.common.run_folder import RunFolder, default_folder
from ironmoe.bench.common.train import TrainingError
from ironmoe.bench.models.expert_parallel import check_processes, prepare_experts
from ironmoe.bench.models.memory import loading_device
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.train.blocks import checkpoint_blocks
from ironmoe.bench.train.display import Display
from ironmoe.bench.train.held_out import HeldOutRows
from ironmoe.bench.train.making import explained, make_method
from ironmoe.bench.train.options import TrainOptions, check_choice, check_recipe
from ironmoe.bench.train.parallel import prepared
from ironmoe.bench.train.recipe import STANDARD
from ironmoe.bench.train.report.facts import TrainingFacts
from ironmoe.bench.train.report.page import write_training_report
from ironmoe.bench.train.report.terminal import print_figures
from ironmoe.bench.train.rows import Split, checked_split
from ironmoe.bench.train.state import read_state
from ironmoe.bench.train.trainee import Trainee, load_trainee
from ironmoe.bench.train.trainer import Trained, TrainedOn, Trainer
from ironmoe.bench.train.watch import Watch

MODEL = "model.safetensors"
STATE = "training.state"
RESULT = "training.json"
ATTACK = "attack"
LAST_GOOD = "last-good.safetensors"
SPACE = 50_000_000  # bytes for report and pictures, beside the weights
COPIES = 5  # of the weights in the state file: model, average, best and two moments


def run_train_command(options: TrainOptions, console: Console) -> Path:
    """Do what is not done yet: train, write the weights, attack them, write the report.

    Under ``torchrun`` every process takes its parts of each batch and its share of the attack, and
    the first prints and reports.

    Returns:
        The folder of the run.
    """
    check_choice(options.method)
    check_recipe(options.recipe)
    check_processes(options.expert_parallel)
    device = own_device(options.device)
    with ExitStack() as held, processes(device) as group:
        run = _prepared(options, device, group)
        folder = group.first(lambda: run.open(console, held))
        if not run.is_finished:
            if folder is not None:
                folder.worked()
            run.train(console)
        group.first(run.forget_state)
        if options.attack:
            run_attack_command(run.attack_options, console)

    if folder is not None:  # this is the first process
        facts = run.facts(folder)
        write_training_report(run.path, facts, device, group.world)
        print_figures(facts, console)
        console.print(folder.farewell, highlight=False, markup=False, soft_wrap=True)
    return run.path


def _prepared(options: TrainOptions, device: torch.device, group: Processes) -> "_Run":
    """Load the model, choose the rows, make the method: whatever can be wrong is wrong here."""
    rows = checked_split(options.data, options.recipe, group.world)
    at_first = loading_device(device, expert_parallel=options.expert_parallel)
    trainee = load_trainee(options.model, options.data, options.seed, at_first)
    prepare_experts(trainee.model, trainee.name, options.expert_parallel)
    settings = options.settings(trainee)
    if options.recipe.checkpointing:
        checkpoint_blocks(trainee.model)
    model = prepared(
        trainee.model, fsdp=options.fsdp, device=device, expert_parallel=options.expert_parallel
    )

    batches = options.recipe.epochs * options.recipe.steps_of_epoch(len(rows.trained))
    method, warnings = make_method(options.method, options.recipe, model, batches=batches)
    if options.recipe.compile:
        model.compile()
    return _Run(
        options=options,
        trainee=trainee,
        model=model,
        method=method,
        warnings=[*filter(None, [trainee.note]), *warnings],
        rows=rows,
        settings=settings,
        path=options.out or default_folder(f"train-{slug(options.data.name)}", settings),
        device=device,
        group=group,
    )


@dataclass(frozen=True)
class _Run:
    """One training, ready to begin. path: of the folder; settings: what makes two runs the same
    run."""

    options: TrainOptions
    trainee: Trainee
    model: nn.Module
    method: TrainingMethod
    warnings: list[str]
    rows: Split
    settings: dict[str, Any]
    path: Path
    device: torch.device
    group: Processes

    def open(self, console: Console, held: ExitStack) -> RunFolder:
        """Make or open the folder, which is this command's alone until ``held`` is closed."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        # the state file is written anew beside the former one, and the chosen weights in the end
        needed = SPACE + (2 * COPIES + 1) * weights
        ranks = self.options.expert_parallel
        parallel = {"processes": self.group.world, "expert_parallel": ranks}
        folder = RunFolder(self.path, self.settings, needed, parallel=parallel)
        held.enter_context(folder.held())
        console.print(folder.greeting, highlight=False, markup=False)
        return folder

    @property
    def is_finished(self) -> bool:
        """Whether the weights were chosen and written."""
        return (self.path / RESULT).is_file() and (self.path / MODEL).is_file()

    def forget_state(self) -> None:
        """Remove what only a training that goes on needs."""
        (self.path / STATE).unlink(missing_ok=True)

    def train(self, console: Console) -> None:
        """Train, and write the chosen weights and the numbers of the epochs."""
        trainer = self._trainer()
        display = Display(
            console,
            epochs=self.options.recipe.epochs,
            batches=trainer.batches,
            trained_on="accuracy" if self._is_standard else "robust",
        )
        for line in (self.plan, *self.warnings):
            display.say(line)
        try:
            with display, explained(self.options.method.name):
                trained = trainer.run(display)
        except NonFiniteLoss as error:
            raise self._diverged(error) from error
        self.group.first(lambda: self._write(trained))

    @property
    def plan(self) -> str:
        """What is about to be done, in a line."""
        choice, recipe = self.options.method, self.options.recipe
        attack = ""
        if not self._is_standard:
            alpha = to_255(self.method.alpha)
            attack = (
                f" in {choice.norm} at eps {exact(choice.eps_255)}/255, "
                f"{counted(self.method.steps, 'step')} of {alpha:.3g}/255"
            )
        trained, held_out = map(len, self.rows)
        return (
            f"{self.trainee.name}, {self._parameters / 1e3:.0f} k parameters: "
            f"{choice.name}{attack}; {counted(recipe.epochs, 'epoch')} of "
            f"{recipe.steps_of_epoch(trained)} batches, {trained} training images and "
            f"{held_out} held out"
        )

    @property
    def attack_options(self) -> AttackOptions:
        """APGD-T on test images, at the radius of the training."""
        options = self.options
        file = self.path / MODEL
        own = self.trainee.arguments is not None
        return AttackOptions(
            checkpoint=file if own else None,
            model_spec=None if own else self.trainee.spec,
            weights=None if own else file,
            data=ImageOptions(options.data.as_set(), most=options.attack_images),
            suite=Suite(
                names=("apgd-t",),
                norm=options.method.norm,
                eps_255=(options.method.eps_255,),
                dtype=options.recipe.dtype,
            ),
            batch_size=options.recipe.images_of_part,
            device=options.device,
            expert_parallel=options.expert_parallel,
            out=self.path / ATTACK,
        )

    def facts(self, folder: RunFolder) -> TrainingFacts:
        """What the report is made from."""
        training = folder.read(RESULT)
        assert training is not None
        return TrainingFacts(
            name=self.trainee.name,
            parameters=self._parameters,
            classes=len(self.trainee.labels.unique()),
            settings=self.settings,
            held_out=len(self.rows.held_out),
            training=training,
            attack=folder.read(f"{ATTACK}/report.json"),
        )

    @property
    def _parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    @property
    def _is_standard(self) -> bool:
        return self.options.method.name == STANDARD

    def _trainer(self) -> Trainer:
        options, labels = self.options, self.trainee.labels
        images = options.data.images
        held_out = HeldOutRows(
            images[self.rows.held_out].to(self.device),
            labels[self.rows.held_out].to(self.device),
            eps=options.method.eps,
            norm=options.method.norm,
            dtype=options.recipe.autocast_dtype,
            together=options.recipe.images_of_part,
        )
        return Trainer(
            self.model,
            self.method,
            options.recipe,
            TrainedOn(images[self.rows.trained], labels[self.rows.trained]),
            held_out,
            seed=options.seed,
            by="clean" if self._is_standard else "robust",
            group=self.group,
            state_file=self.path / STATE,
            watch=Watch(self._guard(held_out), self.method.alarm),
        )

    def _guard(self, held_out: HeldOutRows) -> OverfittingGuard | None:
        """What looks for catastrophic overfitting, to which training against one step is prone."""
        entry = TRAINING_METHODS[self.options.method.name]
        if not self.options.guard or not (entry.single_step or self.method.steps == 1):
            return None
        return OverfittingGuard(
            self.method, held_out.images, held_out.labels, batch_size=held_out.together
        )

    def _write(self, trained: Trained) -> None:
        """Write the weights, then the numbers."""
        extra = self._extra(trained.seconds) | {"epoch": trained.chosen}
        write_atomically(self.path / MODEL, self.trainee.saved(trained.weights, extra))
        numbers = {
            "chosen": trained.chosen,
            "seconds": trained.seconds,
            "steps": self.method.steps,
            "alpha_255": to_255(self.method.alpha),
            "warnings": [*self.warnings, *trained.warnings],
            "stopped": trained.stopped,
            "curves": trained.curves,
        }
        write_json(self.path / RESULT, numbers)

    def _extra(self, seconds: float) -> dict[str, Any]:
        """What the checkpoint says of itself."""
        method, data = self.options.method, self.options.data
        return {
            "name": f"{self.trainee.name} ({method.name})",
            "seed": self.options.seed,
            "seconds": seconds,
            "data": data.name,
            "checksum": data.checksum,
            "classes": self.trainee.classes,
            "method": method._asdict(),
        }

    def _diverged(self, error: NonFiniteLoss) -> TrainingError:
        """The error of a training that cannot go on; the last good weights are written."""
        state = read_state(self.path / STATE)
        kept = ""
        if state is not None:
            after = (
                f"after epoch {state.numbers['epoch']}" if state.numbers["epoch"] else "before it"
            )
            file = self.path / (
                LAST_GOOD if self.group.is_first else f"{self.group.rank}-{LAST_GOOD}"
            )
            extra = self._extra(state.numbers["seconds"])
            write_atomically(file, self.trainee.saved(state.of("model"), extra))
            kept = f" The weights {after} are kept in {file}."
        return TrainingError(f"{error}.{kept}")
