"""The vote: every noisy copy of every image is shown to the model once, in batches that know
nothing of where one image ends and the next one begins. What it said is kept as counts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.certificates.noise import copy_keys, with_noise
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.inputs import Chunk


@dataclass
class Tally:
    """The votes over one image so far: counts, and nothing of the image.

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


@dataclass
class Ballot:
    """An image (1, …) with its further inputs (1, …), and the votes over it so far."""

    image: Tensor
    side: Mapping[str, Tensor]
    tally: Tally


class Part(NamedTuple):
    """So many copies of one image, from copy ``first`` on, as they lie in a batch."""

    ballot: Ballot
    first: int
    copies: int


class Voting:
    """Asks the model about noisy copies and counts its answers.

    Args:
        model: asked in full precision, without gradients.
        sigma: standard deviation of the noise, in units of the images.
        seed: of the noise.
        batch_size: how many copies the model sees at once.
        draws: (draw, how many copies it has), one after another, for each image.

    Attributes:
        classes: how many the model has, once it was asked; None while that is not known, and for a
            model of labels alone.
    """

    def __init__(
        self,
        model: AttackedModel,
        sigma: float,
        seed: int,
        batch_size: int,
        draws: Sequence[tuple[int, int]],
    ) -> None:
        self.model = model
        self.sigma = sigma
        self.seed = seed
        self.batch_size = batch_size
        self.draws = tuple(draws)
        self.ends = torch.tensor([count for _, count in draws]).cumsum(0)
        self.classes: int | None = None

    @property
    def copies(self) -> int:
        """How many copies of an image there are in all draws."""
        return sum(count for _, count in self.draws)

    def run(self, ballots: Iterable[Ballot]) -> Iterator[Ballot]:
        """Each ballot after each batch that it was part of; the last time it is complete.

        Raises:
            ValueError: the outputs for a copy are not finite, or have too few classes for a label.
        """
        for parts in self._batches(ballots):
            self._ask(parts)
            for part in parts:
                yield part.ballot

    def is_complete(self, tally: Tally) -> bool:
        """Whether every copy was asked about."""
        return tally.drawn >= self.copies

    def _batches(self, ballots: Iterable[Ballot]) -> Iterator[list[Part]]:
        parts: list[Part] = []
        room = self.batch_size
        for ballot in ballots:
            first = ballot.tally.drawn  # a complete one has no part in a batch
            while first < self.copies:
                count = min(room, self.copies - first)
                parts.append(Part(ballot, first, count))
                first += count
                room -= count
                if not room:
                    yield parts
                    parts, room = [], self.batch_size
        if parts:
            yield parts

    def _ask(self, parts: Sequence[Part]) -> None:
        """Show one batch to the model and add its answers to the tallies."""
        counts = torch.tensor([part.copies for part in parts])
        numbers = torch.tensor([part.ballot.tally.example for part in parts])
        indices = numbers.repeat_interleave(counts)
        places = torch.cat([torch.arange(part.first, part.first + part.copies) for part in parts])

        # The number of a copy within its draw, so that no draw depends on the length of another.
        which = torch.bucketize(places, self.ends, right=True)
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        draws = torch.tensor([draw for draw, _ in self.draws])
        keys = copy_keys(self.seed, indices, draws[which], places - starts[which])

        images = torch.cat([_repeated(part.ballot.image, part.copies) for part in parts])
        columns = {
            name: torch.cat([_repeated(part.ballot.side[name], part.copies) for part in parts])
            for name in parts[0].ballot.side
        }
        noisy = with_noise(images, self.sigma, keys.to(images.device))
        outputs = self.model.judge(noisy, columns)

        check_finite(self.model, outputs, indices, self.sigma)
        self.classes = outputs.shape[1] if outputs.ndim > 1 else None
        labels = [part.ballot.tally.label for part in parts]
        self.model.goal.check(outputs, torch.tensor(labels))
        self._count(parts, self.model.goal.prediction(outputs).tolist())

    def _count(self, parts: Sequence[Part], classes: Sequence[int]) -> None:
        """Add the class of each copy of a batch to the tally of its image and draw."""
        begin = 0
        for ballot, first, copies in parts:
            tally = ballot.tally
            tally.votes = tally.votes or [Counter() for _ in self.draws]
            last = first + copies
            start = 0
            for votes, (_, length) in zip(tally.votes, self.draws, strict=True):
                low = max(first, start)
                high = min(last, start + length)
                if low < high:
                    votes.update(classes[begin + low - first : begin + high - first])
                start += length
            tally.drawn = last
            begin += copies


def ballots_of(chunk: Chunk, tallies: Sequence[Tally]) -> Iterator[Ballot]:
    """A ballot for each image of the chunk, with its tally."""
    for place, tally in enumerate(tallies):
        row = slice(place, place + 1)
        side = {name: column[row] for name, column in chunk.side.items()}
        yield Ballot(chunk.images[row], side, tally)


def check_finite(model: AttackedModel, outputs: Tensor, indices: Tensor, sigma: float) -> None:
    """ValueError: the outputs (R, …) for noisy copies of images with the numbers ``indices`` (R,)
    are not finite."""
    bad = model.goal.bad(outputs).cpu()
    if bool(bad.any()):
        raise ValueError(
            f"model must return finite logits, got NaN or infinity for {int(bad.sum())} noisy "
            f"copies (sigma {sigma:g}), first of the image with the number "
            f"{int(indices[bad][0])} in the data"
        )


def _repeated(row: Tensor, count: int) -> Tensor:
    """(1, …) → (count, …)"""
    return row.expand(count, *row.shape[1:])
