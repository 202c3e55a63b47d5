"""What ``ironmoe attack`` says when an evaluation fails or cannot begin."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ironmoe.attacks.data import DataError, UnreadableImage
from ironmoe.attacks.evaluation.checks.model_checks import passes_of_checks
from ironmoe.attacks.evaluation.journal_file import JournalError
from ironmoe.attacks.model_errors import INSTEAD, NoGradient
from ironmoe.bench.attack.parts import Part
from ironmoe.bench.attack.suite import SuiteError
from ironmoe.bench.common.errors import told
from ironmoe.bench.data.sets import SKIP_BAD
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.moe.checkpoints.errors import CheckpointError
from ironmoe.moe.exchange.errors import is_of_exchange


@contextmanager
def explained(loaded: LoadedModel) -> Iterator[None]:
    """Inside the block, an error of the model or of the attacks becomes a message of one line. A
    bug keeps its traceback."""
    try:
        yield
    except JournalError as error:
        raise SuiteError(str(error)) from error
    except UnreadableImage as error:
        raise UnreadableImage(f"{error} ({SKIP_BAD})") from error
    except DataError:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        modules = [frame.f_globals.get("__name__", "") for frame in frames]

        if is_of_exchange(error):
            raise  # bench.common.processes finds out which process ended, and why
        if isinstance(error, NoGradient):
            has_scores = error.instead == INSTEAD
            instead = "--attack square needs no gradients" if has_scores else error.instead
            raise SuiteError(f"{loaded.source}: {error.what}; {instead}") from error
        if isinstance(error, ValueError) and modules[-1].startswith("ironmoe."):
            raise SuiteError(f"{loaded.source}: {error}") from error
        if any(frame.f_locals.get("self") is loaded.model for frame in frames):
            raise CheckpointError(f"{loaded.source} failed under attack: {told(error)}") from error
        raise


def too_small_a_budget(
    parts: dict[str, tuple[Part, ...]],
    *,
    images: int,
    batch_size: int,
    checks: bool,
    max_forwards: int | None,
    passes: int,
    world: int,
) -> SuiteError:
    """The error for a budget that did not suffice for the clean images of the first batch.

    images: how many are to be attacked; passes: how many each verdict rests on; world: how many
    processes share the budget.
    """
    if max_forwards is None:
        return SuiteError(
            "--max-seconds or --max-forwards ended the evaluation before it began; give it more"
        )

    batch = min(batch_size, images)
    least_passes = min(part.eot for of_attack in parts.values() for part in of_attack)
    clean = batch * passes
    first_question = batch * (passes + least_passes)
    of_checks = passes_of_checks(batch)
    are_made = checks and max_forwards >= world * of_checks

    needs = f"{of_checks} for the checks and " if are_made and of_checks else ""
    each = "" if world == 1 else ", in each of the processes, which share the budget"
    return SuiteError(
        f"--max-forwards {max_forwards} ended the evaluation before it began: the first batch, of "
        f"{batch} images, needs {needs}{clean} for its clean images, and {first_question} more for "
        f"a first question to the model{each}; give it more, or a smaller --batch-size"
    )
