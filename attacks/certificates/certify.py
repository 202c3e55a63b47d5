"""Certify a smoothed model over a data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.certificates.arguments import (
    as_alpha,
    as_attack,
    as_count,
    as_limit,
    as_seed,
    as_sigma,
    first_images,
)
from ironmoe.attacks.certificates.certificate import certificate_of
from ironmoe.attacks.certificates.certification import Certification
from ironmoe.attacks.certificates.everywhere import on_every_process
from ironmoe.attacks.certificates.journal import Journal
from ironmoe.attacks.certificates.noise import Draw
from ironmoe.attacks.certificates.report import CertificationReport, Family
from ironmoe.attacks.certificates.separate import check_separate
from ironmoe.attacks.certificates.voting import Voting
from ironmoe.attacks.engine.attacked_model import Model, Normalize
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.attacks.evaluation.describe import describe_attack
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.sharding import check_whole, current_shard
from ironmoe.attacks.evaluation.source import Batches, Source


def certify(
    model: Model,
    data: Batches,
    *,
    sigma: float,
    selection: int = 100,
    samples: int = 10_000,
    alpha: float = 0.001,
    family: Family = "each",
    batch_size: int = 256,
    seed: int = 0,
    bounds: Bounds = (0.0, 1.0),
    normalize: Normalize | None = None,
    logits_fn: Callable[[Any], Tensor] | None = None,
    journal: Path | str | None = None,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> CertificationReport:
    """Certify the smoothed model, and not the model itself, by randomised smoothing.

    This is CERTIFY of Cohen, Rosenfeld & Kolter (arXiv 1902.02918, section 3.2). The smoothed model
    gives an image the class that the model gives to most copies of it under Gaussian noise. Where
    that class has more than half of the votes, it keeps them for every image that is near enough in
    L2; how near, the votes say. Any model will do, since a vote has no jumps where routing has.

    Of each image ``selection`` copies choose a class, and ``samples`` others say how many votes it
    has: at least p_low, the bound of Clopper and Pearson. Below one half the smoothed model
    abstains, which counts as wrong; else the radius is sigma · Φ⁻¹(p_low). Noisy copies are not
    clamped.

    The model is in eval mode. Votes depend on (seed, number of the image, number of the copy)
    alone, so batches, processes and interruptions change nothing; on CPU only as far as the
    rounding of products of another batch size does not decide. Under ``torchrun`` each process
    takes its share of the images, and each returns the whole report.

    Args:
        model: takes images in ``bounds``, and judges each by itself.
        data: as ``evaluate`` takes it: (images (N, …), labels (N,)), (images, labels, extra), or an
            iterable of such batches.
        sigma: standard deviation of the noise, in the units of ``bounds``: 0.25 in [0, 1] is a
            quarter of the range of a pixel; from 1e-30 to 1e30, as float32 can hold it. Radii are
            in the same units.
        selection: n₀ of the paper.
        samples: n of the paper. It is fixed before the first copy is drawn: to go on until a
            certificate is good enough would make it wrong.
        alpha: a certificate fails with a probability of at most this.
        family: "each": this holds for each certificate; "all": for all of them together, each at
            alpha / N.
        batch_size: how many copies the model sees at once, of one image or of several.
        seed: of the noise; votes under other seeds are independent of each other.
        bounds: lowest and highest valid pixel of the images of the data.
        normalize, logits_fn: as for every attack; noise is added to pixels before ``normalize``.
        journal: a folder, to which the votes over every image are written at once, and every few
            seconds those over the image under way. The same call goes on where it was interrupted,
            with more images, too. A folder is refused for another model, image, label, noise or
            number of copies.
        limit: only the first so many images.
        on_progress: called after each image, and about every second.

    Raises:
        ValueError: a model in which images influence each other (a capacity over several images,
            Expert Choice, statistics of a batch) or which is random in eval mode; outputs that are
            not finite, with the number of the image; no data; an argument outside the above.
        TypeError: arguments that are no such thing.
        JournalError: the folder is about something else, or another process writes to it.
        RuntimeError: another process of ``torchrun`` met one of these; it raises that one.
    """
    sigma = as_sigma(sigma)
    selection = as_count("selection", selection)
    samples = as_count("samples", samples)
    alpha = as_alpha(alpha)
    batch_size = as_count("batch_size", batch_size)
    seed = as_seed(seed)
    limit = as_limit(limit)
    if family not in ("each", "all"):
        raise ValueError(f"family must be 'each' or 'all', got {family!r}")

    shard = current_shard()
    check_whole(shard, model)
    if journal is not None and shard.group is not None:
        raise ValueError(
            "journal must be None in a block of in_step, whose processes would all write it, got "
            f"{str(journal)!r}"
        )
    check_separate(model)
    attack = as_attack(model, bounds, normalize, logits_fn)
    draws = ((Draw.SELECTION, selection), (Draw.ESTIMATE, samples))
    run = Certification(
        source=Source(first_images(data, limit), [attack], batch_size, 1, shard),
        voting=Voting(attack.attacked_model, sigma, seed, batch_size, draws),
        shard=shard,
        on_progress=on_progress,
    )

    def open_journal() -> None:
        if journal is not None:
            settings = _settings(attack, run.voting, alpha, family)
            run.journal = Journal(Path(journal), settings, shard.rank)

    try:
        with borrowed(model):
            on_every_process(shard, open_journal)
            tallies = run.run()
    finally:
        if run.journal is not None:
            run.journal.close()

    if not tallies:
        raise ValueError("data must hold at least one example, got none")
    level = alpha / len(tallies) if family == "all" else alpha
    return CertificationReport(
        certificates=[certificate_of(tally, sigma, level) for tally in tallies],
        sigma=sigma,
        selection=selection,
        samples=samples,
        alpha=alpha,
        family=family,
        seconds=run.seconds,
        notes=run.notes,
    )


def _settings(attack: Attack, voting: Voting, alpha: float, family: str) -> dict[str, Any]:
    """What must be the same for two runs to be one, as JSON values."""
    return {
        "model": model_digest(attack.model),
        "called": describe_attack(attack),
        "sigma": voting.sigma,
        "draws": [[int(draw), count] for draw, count in voting.draws],
        "alpha": alpha,
        "family": family,
        "seed": voting.seed,
    }
