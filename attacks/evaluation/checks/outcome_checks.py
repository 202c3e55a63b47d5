"""Checks against false security: signs in what the attacks did (Croce & Hein, arXiv 2003.01690;
Pintor et al., arXiv 2106.09947)."""

import math

from torch import Tensor

from ironmoe.attacks.engine.counters import LOSS_RISING, ZERO_GRADIENT
from ironmoe.attacks.evaluation.report import AttackSummary, Flag, RobustnessReport

# Square may break this share of all images beyond those that the gradient attacks broke.
SQUARE_GAIN = 0.002
# The loss may still have been rising on this share of the images that held.
RISING_SHARE = 0.1
# An attempt may have begun without a gradient at this share of the images that held.
STILL_SHARE = 0.01
# So many images may be at their target before a targeted attack.
THERE_SHARE = 0.5


def two_answers(seen: bool, passes: int) -> Flag:
    """Whether a model that was taken for a deterministic one denied a success of its own search."""
    tripped = seen and passes == 1
    return Flag(
        "two answers to one image",
        tripped,
        float(seen),
        "The model denied a success that the search had seen with the same model in the same "
        "precision. If it is random, a verdict over one pass is luck: evaluate it with passes=64."
        if tripped
        else "See randomised model."
        if seen
        else "The model stood by every success.",
    )


AT_THEIR_TARGET = (
    "the model classifies them as their labels without any attack. Under targeted=True labels are "
    "the classes to reach, not the true ones"
)
ALL_WRONG = (
    "the model is wrong about all of them. Look at the labels, at what the model expects "
    "(normalize=, bounds=), and at the settings of the goal"
)


def check_outcome(report: RobustnessReport) -> list[Flag]:
    """Look at what the attacks did."""
    checks = (_nothing_attacked, _radius_beyond_box, _standing_still, _square, _rising)
    flags = [check(report) for check in checks]
    flags += _still(report)
    if any(_needs_starts(summary) for summary in report.attacks.values()):
        flags.append(_no_start(report))
    if report.search_model is not None:
        flags.append(_transfer(report.search_model))
    return flags


def _nothing_attacked(report: RobustnessReport) -> Flag:
    """Whether there was anything to attack, and whether it was."""
    name = "nothing to attack"
    reasons = {attack: _why_nothing(summary) for attack, summary in report.attacks.items()}
    idle = {attack: reason for attack, reason in reasons.items() if reason}
    if idle:
        attack, reason = next(iter(idle.items()))
        return Flag(name, True, 1.0, f"{attack} attacked no image: {reason}.")

    there = [
        _share(~summary.clean_correct, ~summary.skipped)
        for summary in report.attacks.values()
        if summary.targeted
    ]
    share = max(there, default=0.0)
    if share > THERE_SHARE:
        return Flag(
            name,
            True,
            share,
            f"{100 * share:.0f} % of the images were not attacked: {AT_THEIR_TARGET}.",
        )
    return Flag(name, False, share, "There were images to attack.")


def _why_nothing(summary: AttackSummary) -> str | None:
    """Why not a single image was attacked; None if one was."""
    counted = ~summary.skipped
    right = summary.clean_correct & counted
    if not len(counted):
        return "the budget ended before one was read"
    if not bool(counted.any()):
        return "all were skipped, since nothing finite came of them"
    if not bool(right.any()):
        return AT_THEIR_TARGET if summary.targeted else ALL_WRONG

    forwards = summary.per_image.get("forwards", right.long() * (summary.passes + 1))
    began = summary.decided | (forwards > summary.passes)
    return None if bool((began & right).any()) else "the budget ended before an attack began"


def _radius_beyond_box(report: RobustnessReport) -> Flag:
    """Whether a radius lets every image become any other."""
    name = "radius larger than the box"
    shares = {
        (attack, eps): eps / summary.box
        for attack, summary in report.attacks.items()
        for eps in summary.eps
        if math.isfinite(eps)
    }
    if not shares:
        return Flag(name, False, 0.0, "No radius is finite.")

    (attack, eps), share = max(shares.items(), key=lambda item: item[1])
    tripped = share >= 1
    box = report.attacks[attack].box
    return Flag(
        name,
        tripped,
        share,
        f"{attack} may change an image by {eps:.6g}, and no two images in bounds lie further apart "
        f"than {box:.6g}: every image may become any other, so that the accuracy says nothing. eps "
        "is in the units of bounds."
        if tripped
        else f"The largest radius is {share:.3g} of the distance between opposite corners.",
    )


def _still(report: RobustnessReport) -> list[Flag]:
    """A radius at which no image can change."""
    still = {attack: summary.eps[-1] for attack, summary in report.attacks.items() if summary.still}
    if not still:
        return []
    attack, eps = next(iter(still.items()))
    message = (
        f"{attack} may not change an image at all: eps is {eps:.6g}, which is 0 or less than a "
        "step of levels=. The accuracy says nothing. eps is in the units of bounds."
    )
    return [Flag("radius too small", True, eps, message)]


def _standing_still(report: RobustnessReport) -> Flag:
    """Whether attacks had a gradient of their own loss to follow where images held."""
    name = "attacks without a gradient"
    shares = {
        attack: _share(summary.flags[ZERO_GRADIENT], _held(summary))
        for attack, summary in report.attacks.items()
    }
    attack, share = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    tripped = share > STILL_SHARE
    return Flag(
        name,
        tripped,
        share,
        f"{attack} began an attempt with a gradient of exactly 0 at {100 * share:.0f} % of the "
        "images that held against it, and could not move. Its loss is flat there: they may well "
        'fall to another one, such as loss="margin" or "dlr", or to Square.'
        if tripped
        else "Where images held, attacks had a gradient to follow.",
    )


def _no_start(report: RobustnessReport) -> Flag:
    """Whether HopSkipJump had anything to start from where images held: without, the final image is
    the clean one."""
    searched = [summary for summary in report.attacks.values() if _needs_starts(summary)]
    share = max(_share(summary.distance == 0, _held(summary)) for summary in searched)
    return Flag(
        "no start for HopSkipJump",
        share > 0,
        share,
        f"HopSkipJump found no misclassified image to start from at {100 * share:.0f} % of the "
        "images that held, and did not attack them: give it some as starts=, or more start_tries."
        if share
        else "HopSkipJump had a start for every image that held.",
    )


def _needs_starts(summary: AttackSummary) -> bool:
    """Whether the search begins at misclassified images, and there are radii to find any in."""
    names = [name for eps, name in summary.stages if eps > 0]
    return bool(names) and all(name == "HopSkipJump" for name in names)


def _transfer(search_model: str) -> Flag:
    return Flag(
        "transfer",
        True,
        1.0,
        f"The attacks searched on another model ({search_model}): images that held may fall to an "
        "attack on the model itself.",
    )


def _held(summary: AttackSummary) -> Tensor:
    """(N,) bool: nothing was found, and everything was tried."""
    return summary.robust & summary.decided & ~summary.skipped


def _share(some: Tensor, of: Tensor) -> float:
    """How many of the latter are among the former, as a share; 0 of none."""
    return int((some & of).sum()) / max(int(of.sum()), 1)


def _square(report: RobustnessReport) -> Flag:
    """Whether attacks without gradients found what gradients had not."""
    name = "Square beats the gradient attacks"
    gains = {attack: _gain(summary, report) for attack, summary in report.attacks.items()}
    known = {attack: gain for attack, gain in gains.items() if gain is not None}
    if not known:
        return Flag.not_looked_at(name, "Square was not run beside attacks that use gradients.")

    attack, gain = max(known.items(), key=lambda item: item[1])
    tripped = gain > SQUARE_GAIN
    return Flag(
        name,
        tripped,
        gain,
        f"{attack} broke {100 * gain:.1f} % of the images: without gradients, and attacks along "
        "gradients had left them. "
        + (
            "Gradients may be masked: trust neither number, and try an adaptive attack."
            if tripped
            else "As it should be."
        ),
    )


def _gain(summary: AttackSummary, report: RobustnessReport) -> float | None:
    """The share of the images that Square, or another attack without gradients, broke and gradient
    attacks had left; None for an attack without such a part, or with nothing to compare it with."""
    total = max(len(summary.fell), 1)
    is_blind = [_is_blind(stage, summary) for _, stage in summary.stages]

    if all(is_blind):
        others = [
            other
            for other in report.attacks.values()
            if not any(_is_blind(stage, other) for _, stage in other.stages)
            and other.box == summary.box
            and other.eps[-1] >= summary.eps[-1]
        ]
        broken = [float((o.robust & o.decided & ~summary.robust).sum()) for o in others]
        return min(broken) / total if others else None

    if any(is_blind):
        broken_without = [n for stage, n in summary.fell_to.items() if _is_blind(stage, summary)]
        return sum(broken_without) / total
    return None


def _is_blind(stage: str, summary: AttackSummary) -> bool:
    """Whether a stage asks for no gradients."""
    return stage in summary.blind or "square" in stage.lower()


def _rising(report: RobustnessReport) -> Flag:
    """Whether more steps would have found more."""
    name = "loss still rising at the end"
    held = [_held(summary) for summary in report.attacks.values()]
    if not any(bool(held_by_one.any()) for held_by_one in held):
        return Flag.not_looked_at(name, "no attack ran to its end on an image that held.")

    rising = [summary.flags[LOSS_RISING] for summary in report.attacks.values()]
    share = max(_share(up, kept) for up, kept in zip(rising, held, strict=True))

    tripped = share > RISING_SHARE
    return Flag(
        name,
        tripped,
        share,
        f"For {100 * share:.0f} % of the images that held, an attempt gained more than a "
        "twentieth of its loss in its last tenth. "
        + ("More steps would find more." if tripped else "More steps would change little."),
    )
