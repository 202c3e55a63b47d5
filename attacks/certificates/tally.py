"""What the model said of the noisy copies of one image so far: counts, and nothing of the image."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """The votes over one image.

    example: the image's number in the data
    label: its class
    checksum: CRC-32 of image, label and further inputs
    drawn: how many of its copies were asked about, those of the first draw before all others
    votes: for each draw, class → how many copies the model gave it
    """

    example: int
    label: int
    checksum: int = -1
    drawn: int = 0
    votes: list[Counter[int]] = field(default_factory=list)

    def flat(self) -> dict[str, Any]:
        """JSON values: a line of a journal."""
        votes = [{str(label): count for label, count in each.items()} for each in self.votes]
        return {
            "example": self.example,
            "label": self.label,
            "checksum": self.checksum,
            "drawn": self.drawn,
            "votes": votes,
        }


def tally_from(values: Mapping[str, Any]) -> Tally:
    """The tally of such a line. TypeError, ValueError, AttributeError: it is none."""
    votes = [
        Counter({int(label): int(count) for label, count in each.items()})
        for each in values.get("votes", [])
    ]
    return Tally(**{**values, "votes": votes})


def ranked(votes: Counter[int]) -> Sequence[tuple[int, int]]:
    """(class, votes), the class of most votes first; of equals the lowest class."""
    return sorted(votes.items(), key=lambda each: (-each[1], each[0]))
