"""``--resize --crop --interpolation --mean --std``: another preprocessing than the model's own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ironmoe.attacks.data.preprocessing import INTERPOLATIONS, Preprocessing
from ironmoe.attacks.data.reading import Pipeline
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.loaded import LoadedModel

Size = tuple[int, int]
Off = Literal["none"]
Value = TypeVar("Value")

OFF: Off = "none"
USUAL = "bilinear"


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What the user says of preprocessing; None: what the model says stays. A model that says
    nothing of its pictures gets their centre square, whatever its mean and std.

    resize: one number, to which the shorter edge is resized with the ratio kept, or (height, width)
        whatever the ratio; "none": pictures keep their size
    crop: (height, width) of the middle; "none": all of it
    interpolation: a name in ``INTERPOLATIONS``
    mean, std: one number, or one for each channel, in units of the pixel range
    """

    resize: int | Size | Off | None = None
    crop: Size | Off | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def parse(
        cls,
        *,
        resize: str | None = None,
        crop: str | None = None,
        interpolation: str | None = None,
        mean: str | None = None,
        std: str | None = None,
    ) -> "Overrides":
        """Read them as a command line has them: ``--resize 256``, ``256x320`` or ``none``,
        ``--crop 224``, ``--mean 0.485,0.456,0.406``.

        Raises:
            UserError: one cannot be read; the message names the option.
        """
        edges = None if resize in (None, OFF) else _read_size("--resize", str(resize))
        side = None if crop in (None, OFF) else _read_size("--crop", str(crop))
        if interpolation is not None and interpolation not in INTERPOLATIONS:
            raise UserError(
                f"--interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}"
            )
        return cls(
            resize=OFF if resize == OFF else edges[0] if edges and len(edges) == 1 else edges,
            crop=OFF if crop == OFF else None if side is None else (side[0], side[-1]),
            interpolation=interpolation,
            mean=None if mean is None else _read_numbers("--mean", mean),
            std=None if std is None else _read_numbers("--std", std, above_zero=True),
        )

    def __bool__(self) -> bool:
        return bool(self.given)

    @property
    def given(self) -> list[str]:
        """The options that say something."""
        names = ("resize", "crop", "interpolation", "mean", "std")
        return [f"--{name}" for name in names if getattr(self, name) is not None]

    def apply(self, loaded: LoadedModel) -> LoadedModel:
        """The model with this preprocessing. Its normalization is changed in place.

        Raises:
            UserError: the options contradict each other or the model; the message names them.
        """
        if not self:
            return loaded
        pipeline = self._pixels(loaded)
        if self.mean is None and self.std is None:
            return loaded._replace(pipeline=pipeline)

        model = loaded.model if isinstance(loaded.model, Classifier) else Classifier(loaded.model)
        mean = self.mean or _known(model.mean) or (0.0,)
        std = self.std or _known(model.std) or (1.0,)
        channels = _channels(loaded, pipeline)
        if channels is None and len(mean) == len(std) == 1:  # for however many there are
            model.normalize(mean[0], std[0])
        else:
            channels = channels or max(len(mean), len(std))
            mean, std = _spread("--mean", mean, channels), _spread("--std", std, channels)
            model.normalize(mean, std)

        if isinstance(pipeline, Preprocessing):
            pipeline = pipeline.with_(mean=mean, std=std)
        facts = loaded.facts | {"mean": mean, "std": std}
        return loaded._replace(model=model.eval(), pipeline=pipeline, facts=facts)

    def _pixels(self, loaded: LoadedModel) -> Pipeline | None:
        """The pipeline with another resize, crop and interpolation."""
        asked = [name for name in self.given if name not in ("--mean", "--std")]
        if not asked:
            return loaded.pipeline

        told = ", ".join(self.given)
        if isinstance(loaded.pipeline, Preprocessing):
            rules = loaded.pipeline
            told = f"{rules.source}; {told}" if rules.source else told
        else:  # its rules are not ours, so only the size of what the model sees stays
            channels = _channels(loaded, loaded.pipeline) or 3
            is_whole = isinstance(self.resize, tuple) and self.crop is None
            crop = None if is_whole else _size(loaded)
            rules = Preprocessing(channels=channels, interpolation=USUAL, crop=crop)

        changes: dict[str, Any] = {"source": told}
        if self.resize is not None:
            edges = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
            changes["resize"] = None if edges == OFF else edges
            changes["mode"] = "exact" if isinstance(self.resize, tuple) else "shortest"
            if isinstance(self.resize, int) and rules.crop is None:
                changes["crop"] = rules.size  # a picture that keeps its ratio has none by itself
        if self.crop is not None:
            changes["crop"] = None if self.crop == OFF else self.crop
        if self.interpolation is not None:
            changes["interpolation"] = self.interpolation

        rules = rules.with_(**changes)
        self._check(rules, loaded)
        return rules

    def _check(self, rules: Preprocessing, loaded: LoadedModel) -> None:
        """UserError where the options make no sense together, or not for this model."""
        if self.interpolation is not None and rules.resize is None:
            why = f"pictures are not resized for {loaded.name}"
            if self.resize is None and loaded.pipeline is None:
                why = f"{loaded.name} says nothing of how pictures are resized"
            elif self.resize is None and not isinstance(loaded.pipeline, Preprocessing):
                why = f"{loaded.pipeline} is all or nothing"
            raise UserError(f"--interpolation {self.interpolation} must come with --resize: {why}")
        wanted = None if loaded.image_shape is None else loaded.image_shape[1:]
        if wanted is not None and rules.size is not None and rules.size != wanted:
            raise UserError(
                f"{', '.join(self.given)} must end at the {wanted[0]} × {wanted[1]} pixels that "
                f"{loaded.name} takes, got {rules.size[0]} × {rules.size[1]}"
                f"{loaded.for_size(*rules.size)}"
            )


def _size(loaded: LoadedModel) -> Size | None:
    """What the model sees, as far as it says so."""
    if loaded.image_shape is not None:
        _, height, width = loaded.image_shape
        return height, width
    return None if loaded.pipeline is None else loaded.pipeline.size


def _channels(loaded: LoadedModel, pipeline: Pipeline | None) -> int | None:
    if pipeline is not None:
        return pipeline.channels
    return loaded.image_shape[0] if loaded.image_shape else None


def _known(values: Any) -> tuple[float, ...] | None:
    return None if values is None else tuple(values.flatten().tolist())


def _spread(option: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise UserError(
            f"{option} must be one number, or one for each of {channels} channels, got "
            f"{', '.join(map(str, values))}"
        )
    return tuple(values) if len(values) == channels else (values[0],) * channels


def _read_size(option: str, text: str) -> Any:
    """One or two whole numbers above 0."""
    numbers = _read(text, int)
    if numbers is None or len(numbers) > 2 or min(numbers) < 1:
        shorter = "the shorter edge" if option == "--resize" else "a square"
        raise UserError(
            f"{option} must be pixels above 0: 256 for {shorter}, 256x320 for height × width, or "
            f"none, got {text!r}"
        )
    return numbers


def _read_numbers(option: str, text: str, *, above_zero: bool = False) -> tuple[float, ...]:
    """One or several numbers that lie in the pixel range, from 0 to 1."""
    numbers = _read(text, float)
    fits = numbers is not None and all(0 <= number <= 1 for number in numbers)
    if numbers is None or not fits or (above_zero and min(numbers) == 0):
        least = "above 0 and" if above_zero else "at least 0 and"
        of_levels = "" if numbers is None or not 1 < max(numbers) <= 255 else _of_levels(numbers)
        raise UserError(
            f"{option} must be one or several numbers {least} at most 1, the pixel range, such as "
            f"0.5 or 0.485,0.456,0.406, got {text!r}{of_levels}"
        )
    return numbers


def _of_levels(numbers: Sequence[float]) -> str:
    shares = ",".join(f"{number / 255:.4g}" for number in numbers)
    return f"; for these of 255 levels give {shares}"


def _read(text: str, kind: Callable[[str], Value]) -> tuple[Value, ...] | None:
    try:
        return tuple(kind(part) for part in re.split(r"[,x×]", text))
    except ValueError:
        return None
