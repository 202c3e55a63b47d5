"""Arrays of floats, which no rule for pictures is about."""

import numpy as np

from ironmoe.attacks.data import ImageArrays, ImageSet, Preprocessing
from ironmoe.attacks.data.reading import Pipeline


def rules_for(images: ImageSet, rules: Pipeline) -> Pipeline:
    """The rules of a model, or that images stay as they are: arrays of floats of another size than
    the rules make are not resized, and the model has to take them so."""
    if not isinstance(images, ImageArrays) or images.images.dtype == np.uint8:
        return rules
    height, width = images.images.shape[2:]
    if rules.size == (height, width):
        return rules
    return Preprocessing(
        channels=rules.channels, source=f"floats are not resized; pictures would be: {rules}"
    )
