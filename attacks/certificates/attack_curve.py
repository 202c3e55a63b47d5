"""Attack a smoothed model at several radii, and judge what was found by its votes: what stands
beside certified accuracy."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.checked import bounds_text
from ironmoe.attacks.balls.elements import Bound, Bounds
from ironmoe.attacks.balls.lengths import euclidean
from ironmoe.attacks.certificates.arguments import (
    as_alpha,
    as_attack,
    as_count,
    as_limit,
    as_seed,
    as_sigma,
    first_images,
)
from ironmoe.attacks.certificates.certificate import ABSTAINS
from ironmoe.attacks.certificates.curve import AttackCurve, Fate
from ironmoe.attacks.certificates.everywhere import on_every_process
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

# A distance that exceeds the radius by at most this share of it does so by rounding, as that of a
# float32 radius does.
ROUNDING = 1e-6


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
        attack: (smoothed model, radius) → an attack on it, in L2 and in ``bounds``, with an eps of
            no more than the radius. None: PGD, as in SmoothAdv (Salman et al., arXiv 1906.04584),
            which goes all its steps and keeps its best point.
        batch_size: how many copies the model sees at once.

    The others are those of ``certify``.

    Raises:
        ValueError: as ``certify``; radii below 0, or none; an attack in another norm or in other
            bounds, or one that goes further than the radius, by its eps or by what comes back.
        TypeError: arguments that are no such thing; ``attack`` returns no attack.
        RuntimeError: another process of ``torchrun`` met one of these; it raises that one.
    """
    sigma = as_sigma(sigma)
    samples = as_count("samples", samples)
    alpha = as_alpha(alpha)
    draws = as_count("draws", draws)
    steps = as_count("steps", steps)
    batch_size = as_count("batch_size", batch_size)
    seed = as_seed(seed)
    limit = as_limit(limit)
    ascending = _ascending(radii)

    shard = current_shard()
    check_whole(shard, model)
    smoothed = Smoothed(
        model, sigma, draws=draws, seed=seed, normalize=normalize, logits_fn=logits_fn
    )
    called = as_attack(model, bounds, normalize, logits_fn)
    make = _pgd(steps, bounds, seed) if attack is None else attack
    attacks = [
        (radius, _attack_at(radius, make, smoothed, called.bounds))
        for radius in ascending
        if radius > 0
    ]

    at_once = max(1, batch_size // draws)
    source = Source(first_images(data, limit), [called], at_once, 1, shard)
    votings = [
        Voting(
            called.attacked_model, sigma, seed, batch_size, ((Draw.PREDICTION + number, samples),)
        )
        for number in range(len(attacks) + 1)
    ]

    with borrowed(model):
        chunks, notes = looked_at(source, votings[0], shard)
        of_each = on_every_process(
            shard,
            lambda: [
                fate
                for part in _parts(chunks, at_once)
                for fate in _fates(part, attacks, votings, alpha)
            ],
        )

    of_all = [fate for part in of_each for fate in part]
    if not of_all:
        raise ValueError("data must hold at least one example, got none")
    return AttackCurve(
        images=sorted(of_all, key=lambda fate: fate.index),
        radii=tuple(ascending),
        sigma=sigma,
        samples=samples,
        alpha=alpha,
        notes=notes,
    )


def _ascending(radii: Any) -> list[float]:
    """TypeError, ValueError: they are no list of radii, or hold none, or one that is none."""
    try:
        ascending = sorted({float(radius) for radius in radii})
    except (TypeError, ValueError):
        raise TypeError(f"radii must be a list of numbers, got {radii!r}") from None
    if not ascending or not all(0 <= radius < math.inf for radius in ascending):
        raise ValueError(f"radii must hold at least one radius, none below 0, got {radii}")
    return ascending


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


def _attack_at(
    radius: float, make: Callable[[Smoothed, float], Any], smoothed: Smoothed, bounds: Bounds
) -> Attack:
    """The attack that ``make`` makes for this radius. It may go no further: a fall outside the
    radius would say nothing of it, and could put the curve below what is certified.

    Raises:
        TypeError: it is no attack, or ``make`` no function.
        ValueError: it has another norm, other bounds or a larger eps.
    """
    if isinstance(make, Attack) or not callable(make):
        raise TypeError(f"attack must be a function (smoothed model, radius) → attack, got {make}")
    attack = make(smoothed, radius)
    if not isinstance(attack, Attack):
        raise TypeError(
            f"attack must return an attack on the smoothed model, got {type(attack).__name__} at "
            f"radius {radius:g}"
        )

    if attack.norm != "L2":
        raise ValueError(f"attack must be one in L2, as certificates are, got {attack!r}")
    if not all(map(_is_same, attack.bounds, bounds)):
        raise ValueError(
            f"attack must have the bounds of the call, {bounds_text(bounds)}, got "
            f"{bounds_text(attack.bounds)}"
        )
    if attack.largest_eps > radius * (1 + ROUNDING):
        raise ValueError(
            f"attack must keep to the radius {radius:g}, got an eps of {attack.eps_text} in "
            f"{attack!r}"
        )
    return attack


def _parts(chunks: Iterable[Chunk], at_once: int) -> Iterator[Chunk]:
    """The same images, at most so many at once."""
    for chunk in chunks:
        for first in range(0, len(chunk.indices), at_once):
            yield chunk.part(slice(first, first + at_once))


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
        if not bool(standing.any()) or votings[0].classes == 1:  # there is no other class
            break
        found = _attacked(attack, radius, chunk.part(standing), voting.model.image_dtype)
        fell = _is_shown_wrong(voted_classes(voting, found, alpha), found)
        fell_at[standing] = torch.where(fell, radius, fell_at[standing])

    columns = (chunk.indices, chunk.labels, clean, fell_at)
    return [Fate(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _attacked(attack: Attack, radius: float, chunk: Chunk, dtype: torch.dtype) -> Chunk:
    """The images (n, …) as the attack leaves them; it is given them in this dtype.

    Raises:
        ValueError: one lies outside the radius, but for rounding; bounds differ by image.
    """
    extra = {
        name.removeprefix(PREFIX): column
        for name, column in chunk.side.items()
        if name.startswith(PREFIX)
    }
    if len(extra) < len(chunk.side):
        raise ValueError(
            "bounds must be the same for all images of a curve, got others for each image"
        )

    result = attack.run(chunk.images.to(dtype), chunk.labels, chunk.indices, extra=extra or None)
    points = result.adversarial
    distance = euclidean(points.double() - chunk.images.double())
    outside = ~(distance <= radius * (1 + ROUNDING) + _rounding(chunk.images))
    if bool(outside.any()):
        raise ValueError(
            f"attack must keep to the radius {radius:g}, got a point of {attack!r} at the distance "
            f"{float(distance[outside][0]):g} from the image with the number "
            f"{int(chunk.indices[outside][0])} in the data"
        )
    return chunk._replace(images=points)


def _rounding(images: Tensor) -> Tensor:
    """(n,) float64: how far rounding to the dtype of the images can move one of them, at most."""
    return torch.finfo(images.dtype).eps / 2 * euclidean(images.double())


def _is_same(one: Bound, other: Bound) -> bool:
    """Whether two bounds are equal in every element, whether of one number or of a tensor."""
    first, second = (torch.as_tensor(b, dtype=torch.float64, device="cpu") for b in (one, other))
    if first.ndim and second.ndim and first.shape != second.shape:
        return False
    return bool((first == second).all())


def _is_shown_wrong(classes: Tensor, chunk: Chunk) -> Tensor:
    """(n,) bool: the smoothed model names another class than the label."""
    return (classes != chunk.labels) & (classes != ABSTAINS)
