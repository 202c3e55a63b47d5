"""Image files in, streams of pixels and labels out.

Read in this order: ``decoding`` (whatever a file holds becomes an upright 8-bit picture),
``preprocessing`` (from a picture to the pixels of a model), ``image_set`` (what a set is), then the
sets: ``files``, ``label_tables``, ``arrays``; ``stream`` (worker processes read ahead).
"""

from ironmoe.attacks.data.arrays import ImageArrays, image_arrays
from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.files import ImageFiles, image_folder
from ironmoe.attacks.data.image_set import ImageSet, Item
from ironmoe.attacks.data.label_tables import labelled_files
from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.attacks.data.stream import ImageStream, StreamBatch

__all__ = [
    "DataError",
    "ImageArrays",
    "ImageFiles",
    "ImageSet",
    "ImageStream",
    "Item",
    "Preprocessing",
    "StreamBatch",
    "UnreadableImage",
    "image_arrays",
    "image_folder",
    "labelled_files",
]
