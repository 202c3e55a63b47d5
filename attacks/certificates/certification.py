"""One certification under way: the source, the vote, the journal, and what is known of each image.

How votes become certificates, ``certificate`` knows.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ironmoe.attacks.certificates.everywhere import on_every_process
from ironmoe.attacks.certificates.journal import Journal, later
from ironmoe.attacks.certificates.separate import looked_at
from ironmoe.attacks.certificates.voting import Ballot, Tally, Voting, ballots_of
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.evaluation.checksum import checksums_of
from ironmoe.attacks.evaluation.progress import Progress
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.evaluation.source import Source

TELL_SECONDS = 1.0


@dataclass(kw_only=True)
class Certification:
    """One call of ``certify`` under way.

    Attributes:
        source: the images of this process.
        voting: asks the model.
        tallies: image → its votes, as far as this process knows them.
        journal: where votes are written; None: they are kept in memory.
        decided: how many images are done.
        fresh: how many of them in this call.
        notes: what was seen of the model, by all processes.
    """

    source: Source
    voting: Voting
    shard: Shard
    on_progress: Callable[[Progress], None] | None
    tallies: dict[int, Tally] = field(default_factory=dict)
    journal: Journal | None = None
    decided: int = 0
    fresh: int = 0
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.told = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning of this call."""
        return time.perf_counter() - self.began

    def run(self) -> list[Tally]:
        """Look at the model, and ask about every copy that was not asked about before. The tallies
        of all processes come back, in the order of the data.

        Raises:
            ValueError: what is seen of the model forbids a certificate.
            RuntimeError: another process met an error.
        """
        chunks, self.notes = looked_at(self.source, self.voting, self.shard)
        known: dict[int, Tally] = {}
        for part in on_every_process(self.shard, lambda: self._votes(chunks)):
            for example, tally in part.items():
                known[example] = later(known.get(example), tally)
        return [known[example] for example in sorted(known)]

    def _votes(self, chunks: Iterable[Chunk]) -> dict[int, Tally]:
        """Image → its votes, of the images of this process."""
        for ballot in self.voting.run(self._ballots(chunks)):
            is_complete = self.voting.is_complete(ballot.tally)
            if self.journal is not None:
                self.journal.append(ballot.tally, is_complete=is_complete)
            self.decided += is_complete
            self.fresh += is_complete
            self._tell(now=is_complete)
        return self.tallies

    def _ballots(self, chunks: Iterable[Chunk]) -> Iterator[Ballot]:
        """The images, with what the journal knows of them."""
        for chunk in chunks:
            yield from self._ballots_of(chunk)

    def _ballots_of(self, chunk: Chunk) -> Iterator[Ballot]:
        extra = [column for _, column in sorted(chunk.side.items())]
        checksums = checksums_of(chunk.images, chunk.labels, *extra)
        columns = zip(chunk.indices.tolist(), chunk.labels.tolist(), checksums, strict=True)
        tallies = [
            Tally(*values) if self.journal is None else self.journal.tally_of(*values)
            for values in columns
        ]
        self.tallies |= {tally.example: tally for tally in tallies}

        done = sum(self.voting.is_complete(tally) for tally in tallies)
        if done:
            self.decided += done
            self._tell(now=True)
        yield from ballots_of(chunk, tallies)

    def _tell(self, *, now: bool) -> None:
        if self.on_progress is None or not (now or time.monotonic() - self.told > TELL_SECONDS):
            return
        self.told = time.monotonic()
        examples = self.source.examples
        total = None if examples is None else self.shard.share(examples)
        left = None
        if total is not None and self.fresh:  # each image takes as many passes as another
            left = max(total - self.decided, 0) * self.seconds / self.fresh
        self.on_progress(
            Progress(
                decided=self.decided,
                total=total,
                attacks=1,
                fresh=self.fresh,
                seconds=self.seconds,
                forwards=self.voting.model.forwards,
                seconds_left=None if left is None else (left, left),
                seconds_expected=left,
            )
        )
