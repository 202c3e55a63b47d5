"""Checks against false security: signs in what the attacks did (Croce & Hein, arXiv 2003.01690;
Pintor et al., arXiv 2106.09947)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ironmoe.attacks.engine.counters import LOSS_RISING, ZERO_GRADIENT
from ironmoe.attacks.evaluation.findings.flag import Flag
from ironmoe.attacks.evaluation.findings.idle import AT_THEIR_TARGET, why_nothing
from ironmoe.attacks.evaluation.findings.summary import AttackSummary
from ironmoe.attacks.evaluation.report import RobustnessReport

# Square may break this share of all images beyond those that the gradient attacks broke.
SQUARE_GAIN = 0.002
# The loss may still have been rising on this share of the images that held.
RISING_SHARE = 0.1
# An attempt may have begun without a gradient at this share of the images that held.
STILL_SHARE = 0.01
NONE_HELD = "no attack ran to its end on an image that held"
# So many images may be at their target before a targeted attack.
THERE_SHARE = 0.5


def two_answers(report: RobustnessReport, seen: bool) -> Flag:
    """Whether a model that was taken for a deterministic one denied a success of its own search.

    seen: it did deny one.
    """
    name = "two answers to one image"
    if report.passes > 1:
        return Flag.not_looked_at(name, "each verdict rests on many passes, see randomised model")
    if not any(bool(summary.found.any()) for summary in report.attacks.values()):
        return Flag.not_looked_at(name, "the search saw no success that the model could deny")
    return Flag(
        name,
        seen,
        float(seen),
        "The model denied a success that the search had seen with the same model in the same "
        "precision. If it is random, a verdict over one pass is luck: evaluate it with passes=64."
        if seen
        else "The model stood by every success.",
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
    reasons = {attack: why_nothing(summary) for attack, summary in report.attacks.items()}
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


def _radius_beyond_box(report: RobustnessReport) -> Flag:
    """Whether a radius lets every image become any other."""
    name = "radius larger than the box"
    shares = {
        (attack, eps): eps / summary.box
        for attack, summary in report.attacks.items()
        for eps in summary.eps
        if math.isfinite(eps)
    }
    if not report.clean_accuracy.total:
        return Flag.not_looked_at(name, "no image counts")
    if not shares:
        return Flag.not_looked_at(name, "no radius is finite")
    if all(math.isinf(report.attacks[attack].box) for attack, _ in shares):
        return Flag.not_looked_at(
            name,
            "the box has no size: bounds differ from image to image, are "
            "infinite, or a part of an image may not change",
        )

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
    """A radius at which no image can change, or a search that goes nowhere."""
    idle = [attack for attack, summary in report.attacks.items() if not summary.takes_steps]
    if idle:
        message = f"{idle[0]} takes no step, or steps of length 0. The accuracy says nothing."
        return [Flag("attack takes no step", True, 0.0, message)]
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
    following = _along_gradients(report)
    if not following:
        return Flag.not_looked_at(name, "no attack follows gradients")
    shares = {
        attack: _share(summary.flags[ZERO_GRADIENT], _held(summary))
        for attack, summary in following.items()
        if bool(_held(summary).any())
    }
    if not shares:
        return Flag.not_looked_at(name, NONE_HELD)
    attack, share = max(shares.items(), key=lambda item: item[1])
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
    name = "no start for HopSkipJump"
    searched = [summary for summary in report.attacks.values() if _needs_starts(summary)]
    if not any(bool(_held(summary).any()) for summary in searched):
        return Flag.not_looked_at(name, NONE_HELD)
    share = max(_share(summary.distance == 0, _held(summary)) for summary in searched)
    return Flag(
        name,
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


def _along_gradients(report: RobustnessReport) -> dict[str, AttackSummary]:
    """The attacks of which a part asks for gradients."""
    return {
        name: summary
        for name, summary in report.attacks.items()
        if not all(_is_blind(stage, summary) for _, stage in summary.stages)
    }


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
        return Flag.not_looked_at(
            name,
            "no image went through both Square, or another attack without gradients, and an attack "
            "along gradients",
        )

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
        met = _met(summary, range(len(summary.stages)))
        others = [o for o in others if bool((met & o.decided & o.clean_correct).any())]
        broken = [float((o.robust & o.decided & ~summary.robust).sum()) for o in others]
        return min(broken) / total if others else None

    blind_stages = [number for number, blind in enumerate(is_blind) if blind]
    if bool(_met(summary, blind_stages).any()):
        broken_without = [n for stage, n in summary.fell_to.items() if _is_blind(stage, summary)]
        return sum(broken_without) / total
    return None


def _met(summary: AttackSummary, stages: Sequence[int]) -> Tensor:
    """(N,) bool: the image went through one of these stages to its end, or fell to it."""
    ended = summary.passed + summary.fell.long()  # stages that ended, in order
    reached = torch.stack([ended > number for number in stages] or [ended < 0])
    return reached.any(0) & summary.clean_correct & ~summary.skipped


def _is_blind(stage: str, summary: AttackSummary) -> bool:
    """Whether a stage asks for no gradients."""
    return stage in summary.blind or "square" in stage.lower()


def _rising(report: RobustnessReport) -> Flag:
    """Whether more steps would have found more."""
    name = "loss still rising at the end"
    following = _along_gradients(report).values()
    if not following:
        return Flag.not_looked_at(name, "no attack follows gradients")
    held = [_held(summary) for summary in following]
    if not any(bool(held_by_one.any()) for held_by_one in held):
        return Flag.not_looked_at(name, NONE_HELD)

    rising = [summary.flags[LOSS_RISING] for summary in following]
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
