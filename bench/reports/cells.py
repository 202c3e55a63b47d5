"""Numbers as reports print them."""

from ironmoe.attacks import Accuracy, Flag
from ironmoe.attacks.evaluation.findings.accuracy import share as text_of_share


def percent(share: Accuracy) -> str:
    """A share such as "12.3 %", or "12.3 to 14.9 %" where images are undecided."""
    return text_of_share(share)


def brackets(interval: tuple[float, float]) -> str:
    """An interval of two shares, in percent, such as "[10.1, 14.9]"."""
    low, high = interval
    return f"[{100 * low:.1f}, {100 * high:.1f}]"


def speed(rate: float | None) -> str:
    """A rate in three digits, from 100 on as a whole number; "–" for None."""
    if rate is None:
        return "–"
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def value_of(flag: Flag) -> str:
    """The number that a check rests on; "–" where it looked at nothing."""
    return f"{flag.value:.3g}" if flag.looked_at else "–"


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}{'s' * (number != 1)}"
