"""Attack a smoothed model at several radii, and judge what was found by its votes: what stands
beside certified accuracy."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.elements import Bounds
from ironmoe.attacks.certificates.arguments import as_attack, check_arguments, first_images
from ironmoe.attacks.certificates.certificate import ABSTAINS
from ironmoe.attacks.certificates.curve import AttackCurve, Fate
from ironmoe.attacks.certificates.noise import Draw
from ironmoe.attacks.certificates.predict import voted_classes
from ironmoe.attacks.certificates.separate import looked_at
from ironmoe.attacks.certificates.smoothed import Smoothed
from ironmoe.attacks.certificates.voting import Voting
from ironmoe.attacks.engine.attacked_model import Model, Normalize
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.evaluation.sharding import check_whole, current_shard
from ironmoe.attacks.evaluation.source import Batches, Source
from ironmoe.attacks.extra import PREFIX
from ironmoe.attacks.methods.pgd import PGD


def attack_curve(
    model: Model,
    data: Batches,
    radii: Sequence[float],
    *,
    sigma: float,
    samples: int = 1_000,
    alpha: float = 0.001,
    draws: int = 16,
    steps: int = 20,
    attack: Callable[[Smoothed, float], Attack] | None = None,
    batch_size: int = 256,
    seed: int = 0,
    bounds: Bounds = (0.0, 1.0),
    normalize: Normalize | None = None,
    logits_fn: Callable[[Any], Tensor] | None = None,
    limit: int | None = None,
) -> AttackCurve:
    """Robust accuracy of a smoothed model in L2 at each radius, as far as an attack can tell.

    At each radius an image is attacked through ``Smoothed``, and ``predict`` says what the smoothed
    model makes of what was found, by copies of its own. An image falls where that is another class
    than its label; one on which the smoothed model abstains has not fallen. So the curve is an
    upper bound of robust accuracy, as certified accuracy is a lower one, but for the share alpha of
    predictions that may be wrong. An image that fell is not attacked at larger radii.

    Nothing is kept on the disk. Under ``torchrun`` each process takes its share of the images.

    Args:
        radii: at least 0, in the units of ``bounds``.
        samples: how many copies a prediction takes.
        alpha: a prediction is wrong with a probability of at most this.
        draws: how many copies of an image the attack climbs on.
        steps: of the attack, each of length 2 · radius / steps.
        attack: (smoothed model, radius) → an attack on it, in L2. None: PGD, as in SmoothAdv
            (Salman et al., arXiv 1906.04584), which goes all its steps and keeps its best point.
        batch_size: how many copies the model sees at once.

    The others are those of ``certify``.

    Raises:
        ValueError, TypeError: as ``certify``; radii below 0, or none; an attack in another norm.
    """
    check_arguments(
        sigma=sigma,
        samples=samples,
        alpha=alpha,
        draws=draws,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        limit=limit,
    )
    ascending = sorted({float(radius) for radius in radii})
    if not ascending or not all(0 <= radius < math.inf for radius in ascending):
        raise ValueError(f"radii must hold at least one radius, none below 0, got {radii}")

    shard = current_shard()
    check_whole(shard, model)
    smoothed = Smoothed(
        model, sigma, draws=draws, seed=seed, normalize=normalize, logits_fn=logits_fn
    )
    make = attack or _pgd(steps, bounds, seed)
    attacks = [(radius, _in_l2(make(smoothed, radius))) for radius in ascending if radius > 0]

    called = as_attack(model, bounds, normalize, logits_fn)
    at_once = max(1, batch_size // draws)
    source = Source(first_images(data, limit), [called], at_once, 1, shard)
    votings = [
        Voting(
            called.attacked_model, sigma, seed, batch_size, ((Draw.PREDICTION + number, samples),)
        )
        for number in range(len(attacks) + 1)
    ]

    fates: list[Fate] = []
    with borrowed(model):
        chunks, notes = looked_at(source, votings[0], shard)
        for chunk in chunks:
            for first in range(0, len(chunk.indices), at_once):
                part = chunk.part(slice(first, first + at_once))
                fates += _fates(part, attacks, votings, alpha)

    of_all = [fate for part in shard.gather_objects(fates) for fate in part]
    if not of_all:
        raise ValueError("data must hold at least one example, got none")
    return AttackCurve(
        images=sorted(of_all, key=lambda fate: fate.index),
        radii=tuple(ascending),
        sigma=float(sigma),
        samples=samples,
        alpha=alpha,
        notes=notes,
    )


def _pgd(steps: int, bounds: Bounds, seed: int) -> Callable[[Smoothed, float], Attack]:
    """PGD as in SmoothAdv."""

    def make(smoothed: Smoothed, radius: float) -> Attack:
        attack = PGD(
            smoothed,
            radius,
            alpha=2 * radius / steps,
            steps=steps,
            norm="L2",
            bounds=bounds,
            seed=seed,
            early_stop=False,
        )
        # Few draws may call an image wrong that the vote calls right.
        attack.attacks_wrong = True
        return attack

    return make


def _in_l2(attack: Attack) -> Attack:
    if attack.norm != "L2":
        raise ValueError(f"attack must be one in L2, as certificates are, got {attack!r}")
    return attack


def _fates(
    chunk: Chunk,
    attacks: Sequence[tuple[float, Attack]],
    votings: Sequence[Voting],
    alpha: float,
) -> list[Fate]:
    """What becomes of each image: of each attack, the images that did not fall before."""
    clean = voted_classes(votings[0], chunk, alpha)
    fell_at = torch.full(clean.shape, math.inf, dtype=torch.float64, device=clean.device)
    fell_at[_is_shown_wrong(clean, chunk)] = 0

    for (radius, attack), voting in zip(attacks, votings[1:], strict=True):
        standing = fell_at.isinf()
        if not bool(standing.any()):
            break
        left = chunk.part(standing)
        extra = {name.removeprefix(PREFIX): column for name, column in left.side.items()}
        images = left.images.to(voting.model.image_dtype)
        result = attack.run(images, left.labels, left.indices, extra=extra or None)

        attacked = left._replace(images=result.adversarial)
        fell = _is_shown_wrong(voted_classes(voting, attacked, alpha), attacked)
        fell_at[standing] = torch.where(fell, radius, fell_at[standing])

    columns = (chunk.indices, chunk.labels, clean, fell_at)
    return [Fate(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _is_shown_wrong(classes: Tensor, chunk: Chunk) -> Tensor:
    """(n,) bool: the smoothed model names another class than the label."""
    return (classes != chunk.labels) & (classes != ABSTAINS)
