"""The names of numbers that claims read, and what they are called."""

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
    MARGIN: "margin of clean images",
}
FROM = {
    AREA: "curve",
    CLEAN: "clean",
    LEAST_EPS: "least radius",
    RADIUS: "derivative",
    JACOBIAN: "derivative",
    GATE_SUM: "expert use",
    TOP_DISTANCE: "top experts",
    MARGIN: "clean",
}
STEERED = ":clean"  # the end of names of clean accuracies under a policy


def measurement_of(key: str) -> str:
    """Which measurement a number is of, as ``--measurements`` has it; "" of one that claims do not
    miss."""
    return "interventions" if key.endswith(STEERED) else FROM.get(key, "")


ATTACKS = {
    "pgd": "PGD",
    "vmoe": "PGD.vmoe",
    "vmoe-clipped": "clipped PGD.vmoe",
    "apgd-ce": "APGD-CE",
    "apgd-t": "APGD-T",
}
WITHIN = {"slope": "largest secant of the logits", "gamma": "curvature γ of the loss"}
"""Of names "what@radius:free"."""


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
    if key.endswith(STEERED):
        return "clean accuracy with other experts"
    what, _, radius = key.partition("@")
    if what in WITHIN:
        return f"{WITHIN[what]} within {float(radius.removesuffix(':free')):.3g}/255"
    return f"accuracy under {ATTACKS[what]} at {radius}/255" if what in ATTACKS else key
