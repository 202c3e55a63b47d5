"""Attack a model over a data set and report what held."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.budget import Budget
from ironmoe.attacks.engine.coupling import check_groups
from ironmoe.attacks.engine.judging.passes import PASSES, check_passes
from ironmoe.attacks.evaluation.arguments import (
    chain_of,
    check_attacks,
    check_shared,
    target_of,
    with_names,
)
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.evaluation.evaluation import Evaluation
from ironmoe.attacks.evaluation.journal import Journal, passes_of_journal
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.report import RobustnessReport
from ironmoe.attacks.evaluation.sharding import current_shard
from ironmoe.attacks.evaluation.shared_journal import open_journal
from ironmoe.attacks.evaluation.source import Batches, Source
from ironmoe.moe.parallel.lock_step import in_step


def evaluate(
    model: Model,
    data: Batches,
    attacks: Mapping[str, Attack] | Sequence[Attack],
    *,
    eps: Sequence[float] | None = None,
    batch_size: int = 256,
    keep_adversarial: bool | Literal["journal"] = False,
    checks: bool = True,
    journal: Path | str | None = None,
    max_forwards: int | None = None,
    max_seconds: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    passes: int | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    search_model: Model | None = None,
) -> RobustnessReport:
    """Run every attack on every example, all in one queue.

    Under ``torchrun`` (an initialised ``torch.distributed``) each process takes its share of the
    examples, and each returns the whole report. What is found does not depend on batches, on the
    number of processes or on interruptions; on CPU only as far as the rounding of products of
    another batch size does not decide.

    Processes that share the weights of a model (expert parallelism, FSDP2) are one: they take the
    same examples and share the work of each pass (``ironmoe.moe.distributed.in_step``). Each of
    them must give the same arguments. The first one of them writes the journal and calls
    ``on_progress``, and its clock counts.

    Args:
        model: the model that is evaluated. The attacks were made for it (named again, so that no
            report mixes two models) or for ``search_model``.
        data: (images (N, …), labels (N,)), or (images, labels, extra); or an iterable of such
            batches, such as a DataLoader that gives the same order each time; or an ``ImageStream``
            (``ironmoe.attacks.data``), of which each process decodes its own share alone.
            ``evaluate`` reads it once and never holds all of it; batches go to the device of the
            model's weights.
            ``extra`` are further inputs of the model with one entry an image: a tensor, a tuple of
            them for arguments by position, or a dict of them for arguments by keyword. Images come
            to the model in another order than here, and some again and again, so whatever belongs
            to an image must travel with it in this way.
        attacks: name → attack, each with the same largest eps for all images; or a list of attacks,
            named by what they print, and by a number where that is the same.
        eps: radii for every attack, in place of its own. An image that falls at one radius is not
            attacked at larger ones, since its adversarial example lies in those balls, too.
        batch_size: how many images the active batch holds. Images of models that couple them (a
            capacity) stay together in whole groups; where a group is the whole batch, it has this
            size.
        keep_adversarial: keep the final images in the report; NaN where a budget left an image
            undecided. "journal": keep them in the files of the journal alone, from where
            ``AttackSummary.final`` reads those that are asked for.
        checks: look at the model first, and at the outcome, for signs of false security:
            ``report.checks``.
        journal: a folder, to which every result is written at once. The same call goes on where it
            was interrupted. A folder is refused for another model, attack (every setting counts),
            image, label or further input; callables are compared by name.
        max_forwards, max_seconds: the evaluation ends before it spends more forward passes of
            single images, or more time, than this (in this call, checks included; with several
            processes each has an equal share). The report counts what is not decided, and the
            images that were not reached, if the length of the data is known.
        on_progress: called as images are decided, and about every second while none is.
        passes: how often the model is asked for each prediction that counts, clean and adversarial
            alike: 1, or an even number of at least 16. None: 1 for a deterministic model; 64 where
            the look at the model (``checks``) finds it random, or an attack has ``eot`` above 1.
            With more than one, an image is misclassified if a test with an error of at most 1 %
            says that the model is wrong in more than half of its passes, and accuracies are the
            expected accuracy of a pass.
        on_bad: what becomes of images for which the model's outputs or gradients are not finite:
            "raise" a ValueError that names them by their number in the data, or "skip" them. A
            skipped image counts as neither robust nor fallen, and not among the images.
        search_model: the model that the attacks were made for, if it is another one than ``model``:
            a transfer. The search asks this model alone, ``model`` is asked about each clean image
            and about the final image of each attempt. An attack that would stop at its first
            success goes on and keeps its best point. ``model`` is called as the attacks call
            theirs, with their ``normalize`` and ``logits_fn``. Several models: ``Ensemble``.

    Raises:
        ValueError: no attack, an attack for another model, no data, or a bad input (see
            ``Attack.run``).
        TypeError: attacks, radii or data that are no such thing.
        JournalError: the folder is the journal of another evaluation, or another process writes to
            it.
        RanksDisagreeError: processes that share the weights came with other arguments or images.
        ExchangeError: one of them ended.
    """
    attacks = with_names(attacks, search_model)
    check_attacks(model, attacks, batch_size, search_model)
    check_passes(passes)
    target = target_of(model, search_model, attacks)
    shard = current_shard(model, search_model)
    folder = None if journal is None else Path(journal)
    begun = shard.first(lambda: None if folder is None else passes_of_journal(folder))
    if begun is None:
        check_shared(attacks)  # what was begun before this was refused goes on as it is
    passes = begun if passes is None else passes
    chains = [chain_of(attack, eps) for attack in attacks.values()]
    unit_sizes = [attack.images_per_unit(batch_size) for attack in attacks.values()]
    for attack, unit_size in zip(attacks.values(), unit_sizes, strict=True):
        check_groups(attack.stages, unit_size)

    if keep_adversarial == "journal" and journal is None:
        raise ValueError("keep_adversarial='journal' must come with a journal, got none")
    if on_bad not in ("raise", "skip"):
        raise ValueError(f"on_bad must be 'raise' or 'skip', got {on_bad!r}")
    described: dict[str, Any] = {}
    if journal is not None or shard.group is not None:
        described = {name: describe_attack(attack) for name, attack in attacks.items()}
    shard.check_same(
        {
            "attacks": described,
            "eps": eps if eps is None else [float(e) for e in eps],
            "batch_size": batch_size,
            "passes": passes,
            "max_forwards": max_forwards,
            "max_seconds": max_seconds,
            "on_bad": on_bad,
            "checks": checks,
            "keep_adversarial": keep_adversarial,
            "journal": None if journal is None else str(journal),
        }
    )
    most = None if max_forwards is None else shard.share(max_forwards)
    budget = Budget(most, max_seconds, shard.agreed)
    together = math.lcm(*unit_sizes)
    source = Source(data, list(attacks.values()), batch_size, together, shard, target)

    # An attack with eot says that the model which it searches on is random.
    of_random = any(stage.eot > 1 for attack in attacks.values() for stage in attack.stages)
    if passes is None and of_random and target is None:
        passes = PASSES

    evaluation = Evaluation(
        source=source,
        attacks=attacks,
        chains=chains,
        unit_sizes=unit_sizes,
        shard=shard,
        budget=budget,
        batch_size=batch_size,
        keep_adversarial=keep_adversarial,
        passes=passes,
        target=target,
        skips_bad=on_bad == "skip",
        on_progress=on_progress if shard.is_first else None,
    )

    def opened(passes: int) -> Journal:
        settings: dict[str, Any] = {
            "attacks": described,
            "eps": None if eps is None else sorted({float(e) for e in eps}),
            "model": model_digest(model),
            "units": unit_sizes,
            "keep_adversarial": bool(keep_adversarial),
        }
        if passes > 1:
            settings["passes"] = passes
        if target is not None:
            settings["search_model"] = model_digest(search_model)
        return open_journal(Path(str(journal)), settings, shard)

    modules = [each for each in (model, search_model) if isinstance(each, nn.Module)]
    try:
        with (
            in_step(*modules),
            borrowed(model),
            borrowed(model if search_model is None else search_model),
        ):
            flags = evaluation.run(checks, None if journal is None else opened)
    finally:
        if evaluation.journal is not None:
            evaluation.journal.close()

    if not source.seen and not source.examples:
        raise ValueError("data must hold at least one example, got none")
    return evaluation.report(flags, checks)
