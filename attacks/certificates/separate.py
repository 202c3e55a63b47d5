"""Whether a model judges each noisy copy by itself, and gives it one answer: what a certificate
takes for granted.

The votes over the copies of an image must be independent draws of one function. A layer that lets
copies influence each other, as a capacity over several images does, makes them something else.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.certificates.everywhere import on_every_process
from ironmoe.attacks.certificates.noise import Draw, copy_keys, with_noise
from ironmoe.attacks.certificates.voting import Voting, check_finite
from ironmoe.attacks.engine.coupling import images_per_unit, layer_with_batch_statistics
from ironmoe.attacks.engine.inputs import Chunk
from ironmoe.attacks.evaluation.arguments import name_of
from ironmoe.attacks.evaluation.checks.distances import DIFFERS, apart
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.evaluation.source import Source

# So many noisy copies show it.
COPIES = 64
# A router at a tie, or low precision, moves few answers with the size of a batch; a model that is
# random or looks at its batch moves nearly all of them.
MANY = 1 / 8
# In units of the last place of the images' dtype, answers may lie this far apart by rounding.
ROUNDING = 32


class Look(NamedTuple):
    """What was seen.

    refused: why the model can have no certificate; None if it can
    note: what a report should say; None if there is nothing
    """

    refused: str | None = None
    note: str | None = None


def check_separate(model: Any) -> None:
    """ValueError: a layer of the model lets images influence each other in eval mode, too."""
    if images_per_unit(model, 2) > 1:
        raise ValueError(
            f"model must judge each image by itself for a certificate, got {name_of(model)}, whose "
            "images influence each other (a capacity or Expert Choice): noisy copies would not be "
            "independent. Capacity(…, images_per_group=1) lets no image influence another"
        )
    layer = layer_with_batch_statistics(model)
    if layer is not None:
        raise ValueError(
            f"model must judge each image by itself for a certificate, got {name_of(model)}, whose "
            f"layer {layer!r} normalises by the statistics of the batch in eval mode, too: noisy "
            "copies would not be independent"
        )


def looked_at(source: Source, voting: Voting, shard: Shard) -> tuple[Iterator[Chunk], list[str]]:
    """(the chunks of the source, what to say of the model), after a look at noisy copies of the
    first images of each process.

    Raises:
        ValueError: what any process sees forbids a certificate; all of them raise it.
        RuntimeError: another process met an error.
    """
    chunks = iter(source)
    first: list[Chunk] = []

    def looks_here() -> list[Look]:
        first.extend(itertools.islice(chunks, 1))
        return [look_at_copies(voting, chunk) for chunk in first]

    looks = on_every_process(shard, looks_here)
    notes: list[str] = []
    for look in itertools.chain.from_iterable(looks):
        if look.refused is not None:
            raise ValueError(look.refused)
        if look.note is not None and look.note not in notes:
            notes.append(look.note)
    return itertools.chain(first, chunks), notes


def look_at_copies(voting: Voting, chunk: Chunk) -> Look:
    """Ask about noisy copies of the first images twice, and once in two smaller batches.

    Raises:
        ValueError: the outputs are not finite.
    """
    rows = torch.arange(min(COPIES, voting.batch_size))
    places = rows % len(chunk.indices)
    few = chunk.part(places.to(chunk.indices.device))
    keys = copy_keys(voting.seed, few.indices.cpu(), Draw.LOOK, rows // len(chunk.indices))
    noisy = with_noise(few.images, voting.sigma, keys.to(few.images.device))

    model = voting.model
    outputs = model.judge(noisy, few.side)
    check_finite(model, outputs, few.indices.cpu(), voting.sigma)

    random = _seen(outputs, model.judge(noisy, few.side), model.image_dtype)
    if random.many:
        return Look(
            "model must give one answer to one image in eval mode for a certificate, got "
            f"{random}, asked twice about the same ones"
        )

    # Every other copy, and the rest: each has other company than before.
    in_halves = torch.empty_like(outputs)
    for half in (slice(0, None, 2), slice(1, None, 2)) if len(rows) > 1 else (slice(None),):
        side = {name: column[half] for name, column in few.side.items()}
        in_halves[half] = model.judge(noisy[half], side)
    coupled = _seen(outputs, in_halves, model.image_dtype)
    if coupled.many:
        return Look(
            "model must judge each image by itself for a certificate, got "
            f"{coupled}, asked about the same ones in smaller batches: they would not be "
            "independent"
        )

    most = max(random, coupled)
    if most.differing == 0:
        return Look()
    return Look(
        note=f"Asked again, the model gave {most}. Rounding at a router's tie does that, and so do "
        "layers that draw at random or look at the batch, for which a certificate would not hold."
    )


class _Seen(NamedTuple):
    """In how many of all copies two answers differ by more than rounding."""

    differing: int
    copies: int

    @property
    def many(self) -> bool:
        return self.differing > MANY * self.copies

    def __str__(self) -> str:
        return f"other outputs for {self.differing} of {self.copies} noisy copies"


def _seen(outputs: Tensor, others: Tensor, dtype: torch.dtype) -> _Seen:
    rounding = max(DIFFERS, ROUNDING * torch.finfo(dtype).eps)
    return _Seen(int((apart(outputs, others) > rounding).sum()), len(outputs))
