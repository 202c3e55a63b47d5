"""What is left of a study, and how long it will take."""

from typing import NamedTuple

from rich.console import Console

from ironmoe.bench.common.durations import in_words
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.judging.rules import FEWEST_RUNS
from ironmoe.bench.study.ladder.arms import LADDER
from ironmoe.bench.study.ladder.initial import new_model
from ironmoe.bench.study.work.digest import digest
from ironmoe.bench.study.work.estimate import BESIDE, seconds_of_pass, training_passes
from ironmoe.bench.study.work.tasks import Study
from ironmoe.bench.study.work.worker import TRAINED, Task
from ironmoe.bench.train.recipe import TrainRecipe
from ironmoe.bench.train.rows import checked_split

QUIET = Console(quiet=True)


class Piece(NamedTuple):
    """What one process does at a time: the training of a model, or one measurement of it. number:
    of its task; passes: about how many forward and backward passes of one image it takes."""

    number: int
    what: str
    passes: float


class Plan(NamedTuple):
    """left: the pieces that are still to be done, by (number, what); seconds_of_pass: on this
    machine, in one process."""

    left: dict[tuple[int, str], Piece]
    seconds_of_pass: float

    @property
    def passes(self) -> float:
        """Of all that is left."""
        return sum(piece.passes for piece in self.left.values())


def make_plan(study: Study) -> Plan:
    """See what is left, and time a pass."""
    left = {}
    for number, task in enumerate(study.tasks):
        for piece in _left(study, task, number):
            left[(piece.number, piece.what)] = piece
    return Plan(left, _timed(study) if left else 0.0)


def announcement(study: Study, plan: Plan) -> str:
    """What is asked for, what is left of it, and how long that will take."""
    options = study.options
    seeds = counted(len({task.entry.seed for task in study.tasks}), "seed")
    arms = counted(len(study.arms), "arm")
    models = f"{counted(len(study.tasks), 'model')}: {arms} × {seeds}"
    if options.models:
        models = models.replace(" × ", ", ")
    elif len(options.trainings) > 1:
        models += f" × {len(options.trainings)} trainings"
    if not plan.left:
        return f"{models}; everything is measured{_undecided(study)}"

    trainings = sum(what == TRAINED for _, what in plan.left)
    seconds = in_words(BESIDE * plan.passes * plan.seconds_of_pass / options.processes)
    processes = f"{options.processes} process{'es' * (options.processes != 1)}"
    if options.expert_parallel > 1:
        groups = counted(options.processes, "group")
        processes = f"{groups} of {options.expert_parallel} processes, without their exchanges"
    return (
        f"{models}. Left: {trainings} trainings and {len(plan.left) - trainings} measurements, "
        f"about {seconds} in {processes} ({1000 * plan.seconds_of_pass:.2g} ms a pass, timed on "
        f"this machine){_undecided(study)}"
    )


def _undecided(study: Study) -> str:
    """What was guessed of these models, and what they cannot decide, however the numbers turn
    out."""
    texts = [*study.guesses]
    if len({task.entry.seed for task in study.tasks}) < FEWEST_RUNS:
        texts.append(f"Fewer than {FEWEST_RUNS} seeds give no verdict.")
    if not any(arm.is_dense for arm in study.arms):
        texts.append("Without a dense arm nothing is compared with one.")
    if all(arm.is_dense for arm in study.arms):
        texts.append("Without an arm with experts every claim is left open.")
    return "".join(f"\n{text}" for text in texts)


def _left(study: Study, task: Task, number: int) -> list[Piece]:
    trained = task.entry.is_trained
    pieces = []
    if not trained:
        settings = study.options.training
        split = checked_split(study.data, TrainRecipe(batch_size=settings.batch_size), 1)
        passes = training_passes(
            task.entry.training, settings, len(split.trained), len(split.held_out)
        )
        pieces.append(Piece(number, TRAINED, passes))

    known = digest(task.entry, task.entry.get(QUIET), study.images) if trained else None
    for what in task.measurements:
        if known is None or study.store.read(known, what, task.budget) is None:
            pieces.append(Piece(number, what.name, what.passes(task.budget)))
    return pieces


def _timed(study: Study) -> float:
    """Seconds of a pass, the mean of the smallest and the largest architecture."""
    shape = tuple(study.images.shape[1:])
    if study.options.models:
        models = [study.tasks[0].entry.get(QUIET), study.tasks[-1].entry.get(QUIET)]
    else:
        by_experts = sorted(study.arms, key=lambda arm: arm.experts)
        models = [
            new_model(
                LADDER[arm.name], shape, len(study.data.classes), study.options.training.size, 0
            )
            for arm in (by_experts[0], by_experts[-1])
        ]
    return seconds_of_pass([model.eval() for model in models], shape)
