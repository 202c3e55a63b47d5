"""Attack a model over a data set and report what held."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.coupling import check_groups
from ironmoe.attacks.evaluation.arguments import chain_of, check_attacks, with_names
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.evaluation.evaluation import Evaluation
from ironmoe.attacks.evaluation.journal import Journal
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.evaluation.sharding import current_shard
from ironmoe.attacks.evaluation.source import Batches, Source


def evaluate(
    model: Model,
    data: Batches,
    attacks: Mapping[str, Attack] | Sequence[Attack],
    *,
    eps: Sequence[float] | None = None,
    batch_size: int = 256,
    keep_adversarial: bool = False,
    checks: bool = True,
    journal: Path | str | None = None,
    max_forwards: int | None = None,
    max_seconds: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RobustnessReport:
    """Run every attack on every example, all in one queue.

    Under ``torchrun`` (an initialised ``torch.distributed``) each process takes its share of the
    examples, and each returns the whole report. What is found does not depend on batches, on the
    number of processes or on interruptions; on CPU only as far as the rounding of products of
    another batch size does not decide.

    Args:
        model: the model the attacks were made for; named again so that no report mixes two models.
        data: (images (N, …), labels (N,)); or an iterable of such batches, such as a DataLoader
            that gives the same order each time. ``evaluate`` reads it once and never holds all of
            it; batches go to the device of the model's weights.
        attacks: name → attack, each with a single eps; or a list of attacks, named by what they
            print, and by a number where that is the same.
        eps: radii for every attack, in place of its own. An image that falls at one radius is not
            attacked at larger ones, since its adversarial example lies in those balls, too.
        batch_size: how many images the active batch holds. Images of models that couple them (a
            capacity) stay together in whole groups; where a group is the whole batch, it has this
            size.
        keep_adversarial: keep the final images in the report; NaN where a budget left an image
            undecided.
        checks: look at the model first, and at the outcome, for signs of false security:
            ``report.checks``.
        journal: a folder, to which every result is written at once. The same call goes on where it
            was interrupted. A folder is refused for another model, attack (every setting counts),
            image or label; callables are compared by name.
        max_forwards, max_seconds: the evaluation ends before it spends more forward passes of
            single images, or more time, than this (in this call, checks included; with several
            processes each has an equal share). The report counts what is not decided, and the
            images that were not reached, if the length of the data is known.
        on_progress: called as images are decided, and about every second while none is.

    Raises:
        ValueError: no attack, an attack for another model, no data, or a bad input (see
            ``Attack.run``).
        TypeError: attacks, radii or data that are no such thing.
        JournalError: the folder is the journal of another evaluation, or another process writes to
            it.
    """
    attacks = with_names(attacks)
    check_attacks(model, attacks, batch_size)
    chains = [chain_of(attack, eps) for attack in attacks.values()]
    unit_sizes = [attack.images_per_unit(batch_size) for attack in attacks.values()]
    for attack, unit_size in zip(attacks.values(), unit_sizes, strict=True):
        check_groups(attack.stages, unit_size)

    shard = current_shard()
    budget = Budget(None if max_forwards is None else shard.share(max_forwards), max_seconds)
    source = Source(data, list(attacks.values()), batch_size, math.lcm(*unit_sizes), shard)

    notes: Journal | None = None
    if journal is not None:
        settings = {
            "attacks": {name: describe_attack(attack) for name, attack in attacks.items()},
            "eps": None if eps is None else sorted({float(e) for e in eps}),
            "model": model_digest(model),
            "units": unit_sizes,
            "keep_adversarial": keep_adversarial,
        }
        notes = Journal(Path(journal), settings, shard.rank)

    evaluation = Evaluation(
        source=source,
        attacks=attacks,
        chains=chains,
        unit_sizes=unit_sizes,
        shard=shard,
        budget=budget,
        batch_size=batch_size,
        keep_adversarial=keep_adversarial,
        journal=notes,
        on_progress=on_progress,
    )
    try:
        with borrowed(model):
            flags = evaluation.run(checks)
    finally:
        if notes is not None:
            notes.close()

    if not source.seen:
        raise ValueError("data must hold at least one example, got none")
    return evaluation.report(flags, checks)
