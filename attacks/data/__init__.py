"""Image files in, streams of pixels and labels out.

Read in this order: ``decoding`` (whatever a file holds becomes an upright 8-bit picture),
``preprocessing`` (from a picture to the pixels of a model), ``image_set`` (what a set is), then the
sets: ``files``, ``label_tables``, ``arrays``, ``parquet`` and ``huggingface`` (whose ``columns``
are found by the same rules), ``torch_datasets``; ``reading`` (what a worker process does),
``stream`` (worker processes read ahead); and ``loader_stream``, for batches that somebody else's
loader makes. ``classes`` and ``imagenet`` find the logits of labels.
"""

from ironmoe.attacks.data.arrays import ImageArrays, image_arrays
from ironmoe.attacks.data.classes import Matched, match_classes, read_class_map
from ironmoe.attacks.data.errors import DataError, UnreadableImage
from ironmoe.attacks.data.files import ImageFiles, image_folder
from ironmoe.attacks.data.huggingface import SavedImages, saved_dataset
from ironmoe.attacks.data.image_set import ImageSet, Item
from ironmoe.attacks.data.label_tables import labelled_files
from ironmoe.attacks.data.loader_stream import LoaderStream, images_of
from ironmoe.attacks.data.parquet import ParquetImages, parquet_images
from ironmoe.attacks.data.preprocessing import Preprocessing
from ironmoe.attacks.data.stream import ImageStream, StreamBatch
from ironmoe.attacks.data.torch_datasets import TorchImages

__all__ = [
    "DataError",
    "ImageArrays",
    "ImageFiles",
    "ImageSet",
    "ImageStream",
    "Item",
    "LoaderStream",
    "Matched",
    "ParquetImages",
    "Preprocessing",
    "SavedImages",
    "StreamBatch",
    "TorchImages",
    "UnreadableImage",
    "image_arrays",
    "image_folder",
    "images_of",
    "labelled_files",
    "match_classes",
    "parquet_images",
    "read_class_map",
    "saved_dataset",
]
