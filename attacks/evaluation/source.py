"""The data of an evaluation: gone through once, in chunks that the engine takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ironmoe.attacks.attack import Attack
from ironmoe.attacks.balls.elements import box_at, is_by_image
from ironmoe.attacks.data.loader_stream import LoaderStream, check_order
from ironmoe.attacks.data.stream import ImageStream
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.attacks.engine.inputs import Chunk, check_images, check_kinds, prepared
from ironmoe.attacks.evaluation.sharding import Shard
from ironmoe.attacks.extra import Extra, check_taken, cut, extra_columns

Batch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Extra | None]
Batches = Batch | Iterable[Batch] | ImageStream
WHAT = "data must be (images, labels), or batches of them"
OR = "; (images, labels, extra) where the model takes more inputs"


class Source:
    """Chunks of at least a batch, checked, numbered, on the device of the model's weights; only
    this process's share of each, and whole units but for the last chunk.

    Args:
        data: (images, labels), or (images, labels, extra), or batches of them, or a stream of
            images, of which each process reads its own share alone.
        attacks: attacks on one model; each is told the dtype of the images.
        together: how many images must stay side by side.
        target: the model that judges, if it is not that of the attacks; it is told the dtype, too.

    Attributes:
        seen: how many examples were read so far, by all processes; of a stream, by this one.
        examples: how many examples the data has; None while that is not known.
        shape, dtype: those of an image as attacks see it.
        device: where the images go; None while that is not known.
    """

    def __init__(
        self,
        data: Batches,
        attacks: Sequence[Attack],
        batch_size: int,
        together: int,
        shard: Shard,
        target: AttackedModel | None = None,
    ) -> None:
        self.data = data
        self.attacks = attacks
        self.batch_size = batch_size
        self.together = together
        self.shard = shard
        self.target = target
        self.seen = 0
        self.examples: int | None = None
        self.shape = torch.Size()
        self.dtype = torch.float32
        self._names: list[str] = []

        if isinstance(data, tuple):
            if len(data) not in (2, 3) or not all(isinstance(part, Tensor) for part in data[:2]):
                kinds = [type(part).__name__ for part in data]
                raise TypeError(f"{WHAT}, got a tuple of {kinds}{OR}")
            self.examples = len(data[1])
            if len(data) == 3:
                self._check_taken(data, extra_columns(data[2], len(data[1])))
        elif isinstance(data, ImageStream):
            self.examples = len(data)
        elif isinstance(data, LoaderStream):
            self.examples = data.length
        elif isinstance(data, DataLoader):
            check_order(data, "data")
        elif not isinstance(data, Iterable) or isinstance(data, Tensor):
            raise TypeError(f"{WHAT}, got {type(data).__name__}{OR}")
        self.device = attacks[0].attacked_model.device

    def __iter__(self) -> Iterator[Chunk]:
        rest: Chunk | None = None
        for chunk in self._chunks():
            if rest is not None:
                chunk = _joined(rest, chunk)

            count = len(chunk.labels)
            full = count // self.together * self.together if count >= self.batch_size else 0
            rest = chunk.part(slice(full, None))
            yield from self._share(chunk.part(slice(0, full)))

        self.examples = len(self.data) if isinstance(self.data, ImageStream) else self.seen
        if rest is not None:
            yield from self._share(rest)

    def _chunks(self) -> Iterator[Chunk]:
        """The batches of the data."""
        if not isinstance(self.data, ImageStream):
            yield from (self._checked(*batch) for batch in self._batches())
            return

        places = torch.arange(len(self.data))
        if not self._may_differ_by_image:  # else eps and bounds are taken in the order of the data
            places = places[self.shard.takes(places, self.together)]
        for batch in self.data.read(places, ahead=2 * self.batch_size, at_least=self.batch_size):
            device = self.device or torch.device("cpu")
            unread = None if bool(batch.readable.all()) else ~batch.readable.to(device)
            pixels, labels = batch.pixels(device), batch.labels.to(device)
            chunk = self._checked(pixels, labels, None, numbers=batch.places, unread=unread)
            yield chunk._replace(unread=unread)

    @property
    def _may_differ_by_image(self) -> bool:
        values = [value for attack in self.attacks for value in (attack.eps, *attack.bounds)]
        return any(isinstance(value, Tensor) and value.ndim for value in values)

    def _checked(
        self,
        images: Tensor,
        labels: Tensor,
        extra: Any,
        *,
        numbers: Tensor | None = None,
        unread: Tensor | None = None,
    ) -> Chunk:
        """A batch of the data as a chunk; errors say which images it holds. Those that could not be
        read lie in the bounds, wherever these are."""
        first = self.attacks[0]
        begin = self.seen if numbers is None else int(numbers[0])
        try:
            check_kinds(images, labels, first.goal)
            if unread is not None:
                images = self._in_bounds(images, unread)
            by_image = self._by_image(images, labels)
            chunk = prepared(images, labels, numbers, self.seen, extra=extra)
            chunk = chunk._replace(side={**chunk.side, **by_image})
            self._check_names(chunk)
        except (ValueError, TypeError) as error:
            count = len(images) if isinstance(images, Tensor) else 1
            end = begin + count - 1 if numbers is None else int(numbers[-1])
            raise type(error)(f"in data {begin} … {end}: {error}") from error

        for attack in self.attacks:
            for each in (attack, *attack.stages):
                each.attacked_model.image_dtype = images.dtype
        if self.target is not None:
            self.target.image_dtype = images.dtype

        self.device = self.device or images.device
        chunk = chunk.to(self.device)
        self.seen += len(images)
        self.shape = images.shape[1:]
        self.dtype = chunk.images.dtype
        return chunk

    def _in_bounds(self, images: Tensor, unread: Tensor) -> Tensor:
        """The images, those that could not be read moved to the nearest point of the bounds."""
        bounds, _ = self.attacks[0].part_of(images, self.seen, self.examples)
        lowest, highest = box_at(images, bounds)
        inside = images.clamp(min=lowest).clamp(max=highest)
        return torch.where(unread.view(-1, *[1] * (images.ndim - 1)), inside, images)

    def _by_image(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What eps and bounds say of each of these images, as columns (n, …), where an attack has
        other ones for each image; images are found to go with them."""
        found: list[dict[str, Tensor]] = []
        for attack in self.attacks:
            bounds, region = attack.part_of(images, self.seen, self.examples)
            if not found:  # bounds and goals are those of the first attack
                check_images(images, labels, bounds, attack.goal)
            attack.check_grid(images, bounds)
            columns = region.tensors
            if is_by_image(attack.eps, tuple(images.shape[1:])) and region.scale is None:
                columns["eps_scale"] = torch.ones((1,) * images.ndim, dtype=torch.float64)
            if any(is_by_image(bound, tuple(images.shape[1:])) for bound in attack.bounds):
                columns["low_bound"] = torch.as_tensor(region.low, dtype=torch.float64)
                columns["high_bound"] = torch.as_tensor(region.high, dtype=torch.float64)
            found.append(columns if attack.differs_by_image(images) else {})

        if not any(found):
            return {}
        first = found[0]
        same = all(
            each.keys() == first.keys() and all(torch.equal(each[n], first[n]) for n in first)
            for each in found
        )
        if not same:
            raise ValueError(
                "attacks must have the same eps and bounds of each image, where one attack has "
                "other ones for each image; evaluate them one after another"
            )
        return {name: value.expand(images.shape) for name, value in first.items()}

    def _check_names(self, chunk: Chunk) -> None:
        """ValueError: a batch with other further inputs than those before it."""
        names = sorted(chunk.side)
        if self.seen and names != self._names:
            raise ValueError(
                f"extra must have the same names in every batch, got {self._names} and {names}"
            )
        self._names = names

    def _check_taken(self, batch: Sequence[Any], columns: Mapping[str, Tensor]) -> None:
        """TypeError: the model does not take the further inputs of a batch."""
        if not columns:
            return
        kinds = [type(part).__name__ for part in batch]
        got = f"{WHAT}, got a {type(batch).__name__} of {kinds}"
        check_taken(self.attacks[0].model, columns, got)

    def _share(self, chunk: Chunk) -> Iterator[Chunk]:
        mine = self.shard.takes(chunk.indices, self.together)
        if bool(mine.any()):
            yield chunk.part(mine)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Any]]:
        if isinstance(self.data, tuple):
            images, labels = self.data[:2]
            if len(images) != len(labels):
                raise ValueError(
                    f"labels must have one entry for each of {len(images)} images, got "
                    f"{len(labels)}"
                )
            extra = self.data[2] if len(self.data) == 3 else None
            for first in range(0, len(images), self.batch_size):
                places = slice(first, first + self.batch_size)
                yield images[places], labels[places], cut(extra, len(images), places)
            return

        for batch in self.data:
            if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
                got = f"a {type(batch).__name__}" + (
                    f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
                )
                raise TypeError(f"{WHAT}, got {got} as a batch{OR}")
            extra = batch[2] if len(batch) == 3 else None
            if not self.seen and extra is not None:
                self._check_taken(batch, extra_columns(extra, len(batch[1])))
            yield batch[0], batch[1], extra


def _joined(first: Chunk, second: Chunk) -> Chunk:
    return Chunk(
        images=torch.cat([first.images, second.images]),
        labels=torch.cat([first.labels, second.labels]),
        indices=torch.cat([first.indices, second.indices]),
        side={name: torch.cat([first.side[name], second.side[name]]) for name in first.side},
        unread=None
        if first.unread is None and second.unread is None
        else torch.cat([_unread(first), _unread(second)]),
    )


def _unread(chunk: Chunk) -> Tensor:
    return (
        torch.zeros_like(chunk.indices, dtype=torch.bool) if chunk.unread is None else chunk.unread
    )
