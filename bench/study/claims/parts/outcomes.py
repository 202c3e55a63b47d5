"""The names of numbers that claims read, and what they are called."""

from collections.abc import Sequence

from ironmoe.bench.study.claims.parts.units import POINTS, RATIO, Unit

AREA, CLEAN, LEAST_EPS = "auc", "clean", "least_eps"
RADIUS, JACOBIAN, GATE_SUM, TOP_DISTANCE = "r1", "jacobian", "gate_sum", "top_distance"
MARGIN = "margin"  # of images

TITLES = {
    AREA: "accuracy under attack, mean over the radii",
    CLEAN: "clean accuracy",
    LEAST_EPS: "least radius at which the attack succeeds",
    RADIUS: "first-order radius r₁",
    JACOBIAN: "‖J‖ of the logits, which grows with their scale",
    TOP_DISTANCE: "distance of the top experts",
}
ATTACKS = {"pgd": "PGD", "vmoe": "PGD.vmoe", "apgd-ce": "APGD-CE", "apgd-t": "APGD-T"}


AT_AN_END = 0.02  # accuracies this near to 0 or 1 tell no models apart
BLIND = (
    "At these radii {} of these models keeps nearly {} under attack, so that there is nothing to "
    "compare: other radii (--eps) would tell more."
)


def blind(accuracies: Sequence[float | None]) -> str:
    """Why accuracies of arms tell nothing, if all of them lie at the same end; else ""."""
    known = [share for share in accuracies if share is not None]
    if known and max(known) < AT_AN_END:
        return BLIND.format("none", "any image")
    if known and min(known) > 1 - AT_AN_END:
        return BLIND.format("each", "every image")
    return ""


def is_accuracy(key: str) -> bool:
    """Whether it is an accuracy of the model as it is: "clean", or "pgd@8" and the like, an attack
    and its radius in units of 1/255."""
    attack, at, _ = key.partition("@")
    return key == CLEAN or (":" not in key and at == "@" and attack in ATTACKS)


def unit_of(key: str) -> Unit:
    """Points for shares, ratios for all others."""
    return POINTS if key == AREA or is_accuracy(key) else RATIO


def title(key: str) -> str:
    """For a table."""
    if key in TITLES:
        return TITLES[key]
    attack, _, radius = key.partition("@")
    return f"accuracy under {ATTACKS[attack]} at {radius}/255" if attack in ATTACKS else key
