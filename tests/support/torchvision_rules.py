"""torchvision's transforms on Pillow images, written down from its documentation in numpy: what
tests compare with where torchvision cannot be imported.

Resize(number): the shorter edge becomes the number, the other int(number · longer / shorter).
CenterCrop: what is missing is padded with zeros, half of it rounded down on the upper left; the
crop begins at round(difference / 2), where Python rounds halves to even.
"""

import numpy as np
from PIL import Image


def shorter_edge(picture, edge, interpolation):
    """Resize(edge)."""
    width, height = picture.size
    longer = edge * max(width, height) // min(width, height)
    return exact(picture, (edge, longer) if height <= width else (longer, edge), interpolation)


def exact(picture, size, interpolation):
    """Resize((height, width))."""
    return picture.resize((size[1], size[0]), Image.Resampling[interpolation.upper()])


def centre(picture, size, fill=0):
    """CenterCrop(size) as values (height, width, channels)."""
    values = np.array(picture.convert("RGB"))
    for axis, wanted in enumerate(size):
        have = values.shape[axis]
        if have < wanted:
            before = (wanted - have) // 2
            ground = np.empty_like(
                values, shape=tuple(wanted if i == axis else n for i, n in enumerate(values.shape))
            )
            ground[:] = fill
            part = [slice(None)] * 3
            part[axis] = slice(before, before + have)
            ground[tuple(part)] = values
            values = ground
        else:
            start = round((have - wanted) / 2)
            values = np.take(values, range(start, start + wanted), axis)
    return values


def normalized(values, mean, std):
    """ToTensor and Normalize in float64: (channels, height, width)."""
    shares = values.astype(np.float64) / 255
    return ((shares - np.array(mean)) / np.array(std)).transpose(2, 0, 1)
