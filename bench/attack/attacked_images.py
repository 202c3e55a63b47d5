"""The images of an evaluation: which of the set, as which pixels, in which classes of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.data import (
    DataError,
    ImageFiles,
    ImageSet,
    ImageStream,
    LoaderStream,
    UnreadableImage,
)
from ironmoe.attacks.data.classes import read_class_map
from ironmoe.attacks.data.reading import Pipeline
from ironmoe.bench.attack.suite import Suite
from ironmoe.bench.data.loader_images import LoaderImages
from ironmoe.bench.data.sets import AnyData
from ironmoe.bench.data.split import sample, stratified
from ironmoe.bench.models.class_matching import match
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.pixels import pipeline_for

TRIED = 64  # images that may be unreadable before one that tells the shape

OWN_SPLIT = (
    "This split is ironmoe's own. If the model was trained on other parts of these images, it has "
    "seen most of the split, and every accuracy comes out too high; then put images that it has "
    "not seen into a folder or file of their own, and use --all."
)


class ImageOptions(NamedTuple):
    """What the command line says of the images.

    everything: all of the set, not only the test split; most: at most so many; image_size: side in
    pixels, for models that say nothing of their images; workers: processes that decode.
    """

    images: AnyData
    everything: bool = False
    most: int = 500
    image_size: int | None = None
    skip_bad: bool = False
    workers: int | None = None
    class_map: Path | None = None


@dataclass
class AttackedImages:
    """The images of one evaluation, ready to be read.

    stream: gives them, with labels as indices of the logits; shape: (C, H, W) of an image; classes:
    names by index of the logits; notes: what there is to say; checksum: of the set; rounded: the
    largest change that rounding to levels made.
    """

    stream: ImageStream | LoaderImages
    shape: tuple[int, ...]
    classes: list[str]
    notes: list[str]
    name: str
    checksum: str
    rounded: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.stream)

    @property
    def rows(self) -> Tensor:
        """(M,) int64: where the images are in the set."""
        return self.stream.rows

    @property
    def logits(self) -> Tensor | None:
        """(L,) int64, for each label of the set the index of its logit; None: they are indices."""
        return self.stream.logits if isinstance(self.stream, ImageStream) else None

    @property
    def files(self) -> list[str] | None:
        """Of a set of files, their paths by row; None for other sets."""
        images = getattr(self.stream, "images", None)
        return images.files if isinstance(images, ImageFiles) else None

    @property
    def pixels(self) -> str:
        """A line for people: how pictures became pixels, and where that was read."""
        pipeline = self.stream.pipeline
        source = getattr(pipeline, "source", "")
        return f"{pipeline} ({source})" if source else str(pipeline)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return {
            "data": self.name,
            "checksum": self.checksum,
            "preprocessing": self.stream.pipeline.as_dict(),
            "classes": None if self.logits is None else self.logits.tolist(),
        }

    def at(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(images (n, C, H, W) float32 in [0, 1], labels (n,)) of those that can be read at these
        places."""
        read = list(self.stream.read(torch.tensor(places, dtype=torch.int64)))
        good = torch.cat([batch.readable for batch in read])
        images = torch.cat([batch.pixels() for batch in read])
        return images[good], torch.cat([batch.labels for batch in read])[good]


def attacked_images(
    options: ImageOptions,
    loaded: LoadedModel,
    suite: Suite,
    *,
    is_asked: bool = False,
) -> AttackedImages:
    """Choose the images of the set for a model. ``is_asked``: see ``pipeline_for``.

    Raises:
        DataError: the images do not suit the model, or their classes are not the model's.
        CheckpointError: the model cannot take an image.
    """
    images = options.images
    if isinstance(images, LoaderStream):
        return _of_loader(images, options, loaded, suite, is_asked=is_asked)
    if isinstance(images, ImageStream):
        return _of_stream(images, options, loaded, suite, is_asked=is_asked)
    pipeline = pipeline_for(images, loaded, options.image_size, is_asked=is_asked)
    first = _first(images, pipeline)
    matched = match(
        loaded,
        first[None],
        images.names,
        images.labels,
        data=images.name,
        class_map=_class_map(options),
    )
    rows, chosen = _rows(options, images)
    rounded: list[float] = []
    stream = ImageStream(
        images,
        pipeline,
        rows=rows,
        logits=matched.logits,
        workers=options.workers,
        skip_bad=options.skip_bad,
        finish=_finish(suite, rounded),
    )
    return AttackedImages(
        stream=stream,
        shape=tuple(first.shape),
        classes=matched.names,
        notes=[*images.notes, *filter(None, (matched.note, chosen, _of_split(options, loaded)))],
        name=images.name,
        checksum=images.fingerprint,
        rounded=rounded,
    )


def _of_loader(
    loader: LoaderStream,
    options: ImageOptions,
    loaded: LoadedModel,
    suite: Suite,
    *,
    is_asked: bool,
) -> AttackedImages:
    """The images of a user's loader, which come as they are and in its order."""
    _check_unused(options, "a loader", is_asked)
    rounded: list[float] = []
    images = LoaderImages(loader, options.most, finish=_finish(suite, rounded))
    (first,) = images.read(torch.tensor([0]))
    matched = match(
        loaded,
        first.pixels(),
        loader.names,
        None,
        data=loader.name,
        class_map=_class_map(options),
    )
    images.logits = matched.logits
    images.num_logits = len(matched.names)
    whole = "an unknown number" if loader.length is None else str(loader.length)
    notes = [*loader.notes, "Images of a loader are taken as they come.", matched.note]
    if loader.length is None or loader.length > options.most:
        notes.append(
            f"Attacking the first {options.most} of {whole} images (--attack-images for more)."
        )
    return AttackedImages(
        stream=images,
        shape=tuple(first.images.shape[1:]),
        classes=matched.names,
        notes=[note for note in notes if note],
        name=loader.name,
        checksum="",
        rounded=rounded,
    )


def _of_stream(
    stream: ImageStream,
    options: ImageOptions,
    loaded: LoadedModel,
    suite: Suite,
    *,
    is_asked: bool,
) -> AttackedImages:
    """The images of a stream that a user's function made, with pixels as it says, and logits if it
    says any."""
    _check_unused(options, "a stream", is_asked)
    if stream.logits is not None and options.class_map is not None:
        raise DataError("--class-map is for labels, and the stream in --data has logits of its own")
    first = _first(stream.images, stream.pipeline)
    name = stream.images.name
    known = stream.logits is None
    matched = match(
        loaded,
        first[None],
        stream.images.names if known else None,
        stream.images.labels if known else None,
        data=name,
        class_map=_class_map(options),
    )
    rounded: list[float] = []
    chosen = sample(len(stream), options.most)
    part = stream.part(chosen, finish=_finish(suite, rounded))
    part.logits = matched.logits if known else stream.logits
    notes = [*stream.images.notes, *filter(None, [matched.note])]
    if len(chosen) < len(stream):
        notes.append(_of_sample(len(chosen), len(stream)))
    return AttackedImages(
        stream=part,
        shape=tuple(first.shape),
        classes=matched.names,
        notes=notes,
        name=name,
        checksum=stream.images.fingerprint,
        rounded=rounded,
    )


def _check_unused(options: ImageOptions, what: str, is_asked: bool) -> None:
    """DataError: options that only a set can follow."""
    if not options.everything:
        raise DataError(f"{what} in --data has no test split; use --all")
    given = {
        "--image-size": options.image_size,
        "--workers": options.workers,
        "--skip-bad": options.skip_bad or None,
        "--resize or --crop": is_asked or None,
    }
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise DataError(
            f"{unused[0]} is for sets of images, and {what} in --data reads them itself"
        )


def _class_map(options: ImageOptions) -> dict[str, int | str] | None:
    return None if options.class_map is None else read_class_map(options.class_map)


def _of_sample(taken: int, of: int) -> str:
    return (
        f"Attacking {taken} of {of} images (drawn by random numbers that never change; "
        "--attack-images for more)."
    )


def _finish(suite: Suite, rounded: list[float]) -> Callable[[Tensor], Tensor] | None:
    """Rounds a batch to the suite's levels, and notes the largest change in ``rounded``."""
    if suite.levels is None:
        return None

    def finish(pixels: Tensor) -> Tensor:
        on_grid, change = suite.on_grid(pixels)
        rounded[:] = [max([change, *rounded])]
        return on_grid

    return finish


def _rows(options: ImageOptions, images: ImageSet) -> tuple[Tensor, str]:
    """(the rows of the set that are attacked, what there is to say of the choice)."""
    if options.everything:
        rows = sample(len(images), options.most)
        if len(rows) == len(images):
            return rows, ""
        return rows, _of_sample(len(rows), len(images))
    if images.labels is None:
        raise DataError(
            f"the test split of {images.name!r} needs labels that are known before images are "
            "read; use --all"
        )
    labels = images.labels
    names = images.names
    if names is None:
        names = [str(number) for number in range(int(labels.max()) + 1)]
    try:
        test = stratified(labels, names)[1]
    except DataError as error:
        raise DataError(f"{error}; or use --all, which attacks every image") from error

    rows = test[: options.most]
    whole = "the test split, a fifth of each class; --all for all"
    if len(rows) < len(test):
        whole = f"of the test split of {len(test)}; --attack-images for more, --all for all"
    return rows, f"Attacking {len(rows)} of {len(images)} images ({whole})."


def _of_split(options: ImageOptions, loaded: LoadedModel) -> str:
    """What there is to say of the split for a model that ``ironmoe train`` and ``ironmoe demo`` did
    not write."""
    return "" if options.everything or "trained_on_data" in loaded.facts else OWN_SPLIT


def _first(images: ImageSet, pipeline: Pipeline) -> Tensor:
    """(C, H, W) float32 in [0, 1], an image that can be read, among some from all over the set."""
    places = torch.linspace(0, len(images) - 1, min(TRIED, len(images))).long()
    stream = ImageStream(images, pipeline, workers=0, skip_bad=True)
    for place in places.tolist():
        try:
            (batch,) = stream.read(torch.tensor([place]))
        except UnreadableImage:
            continue
        if bool(batch.readable.all()):
            return batch.pixels()[0]
    reason = next(iter(stream.unread.values()), "")
    raise DataError(
        f"data {images.name!r} must hold images that can be read, got none among {len(places)} of "
        f"{len(images)}: {reason}"
    )
