"""Which pixels of a set a model gets: by its own rules, or by what is assumed."""

from ironmoe.attacks.data import DataError, ImageArrays, ImageSet, Preprocessing
from ironmoe.attacks.data.reading import Pipeline
from ironmoe.bench.data.floats import rules_for
from ironmoe.bench.data.in_memory import square_of
from ironmoe.bench.data.sets import AnyData
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.overrides import Overrides


def pipeline_for(
    images: ImageSet, loaded: LoadedModel, image_size: int | None, *, is_asked: bool = False
) -> Pipeline:
    """How pictures become pixels for this model: as it says, or else their centre square.

    Arrays of floats are taken as they are, whatever the model says of pictures; ``is_asked``: the
    user asks for a resize or a crop, which they cannot have.

    Raises:
        DataError: ``image_size`` for a model that says how it wants its images.
    """
    rules = loaded.pipeline
    if rules is not None:
        if image_size is not None and rules.size != (image_size, image_size):
            raise DataError(
                f"--image-size {image_size} is not what {loaded.name} takes: "
                f"{loaded.preprocessing}; use --resize and --crop"
            )
        return rules if is_asked else rules_for(images, rules)
    if isinstance(images, ImageArrays) or loaded.image_shape is None:
        return _with_numbers(square_of(images, image_size), loaded)

    channels, height, width = loaded.image_shape
    if image_size not in (None, height):
        raise DataError(f"--image-size must be {height} for {loaded.name}, got {image_size}")
    return Preprocessing(
        channels=channels, resize=(height, width), mode="square", interpolation="bicubic"
    )


def _with_numbers(rules: Preprocessing, loaded: LoadedModel) -> Preprocessing:
    """The rules with the mean and std that a user gave for a model without rules of its own."""
    given = {name: tuple(loaded.facts.get(name) or ()) for name in ("mean", "std")}
    if not any(given.values()):
        return rules
    whole = {
        name: values * rules.channels if len(values) == 1 else values
        for name, values in given.items()
    }
    return rules.with_(**whole)


def wanted_size(
    images: AnyData, image_size: int | None, overrides: Overrides
) -> tuple[int, int] | None:
    """(height, width) that a model should be built for, if it can be: what the user says, or that
    of arrays; None for pictures."""
    if isinstance(overrides.crop, tuple):
        return overrides.crop
    if image_size is not None:
        return image_size, image_size
    if not isinstance(images, ImageArrays):
        return None
    height, width = images.images.shape[2:]
    return height, width
