"""Which attacks a version of AutoAttack runs, and with which settings."""

from typing import Any

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.methods.apgd import APGD
from ironmoe.attacks.methods.fab import FAB
from ironmoe.attacks.methods.square import Square

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
RAND_EOT = 20


def recipes(version: str, *, sparse: bool) -> dict[str, tuple[type[Attack], dict[str, Any]]]:
    """name → (class, settings); of "custom" they are those of "plus". sparse: in L1."""
    # In L1 the standard version has its own settings (arXiv 2103.01208).
    standard = version == "standard"
    radii: dict[str, Any] = {"three_radii": True} if sparse and standard else {}
    targets = 5 if sparse and standard else 9
    restarts = 1 if version == "rand" or (standard and not sparse) else 5

    return {
        "apgd-ce": (APGD, {"loss": "ce", "restarts": restarts} | radii),
        "apgd-dlr": (APGD, {"loss": "dlr", "restarts": restarts}),
        "apgd-t": (APGD, {"loss": "dlr", "targets": targets} | radii),
        "fab": (FAB, {"targets": 0, "restarts": restarts}),
        "fab-t": (FAB, {"targets": 9}),
        "square": (Square, {"steps": 5000}),
    }
