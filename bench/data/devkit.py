"""The labels of ImageNet's validation images, from the development kit of ILSVRC 2012: what
``ILSVRC2012_devkit_t12.tar.gz`` unpacks to."""

import os
from pathlib import Path

import numpy as np

from ironmoe.attacks.data import DataError, ImageFiles

META = Path("data") / "meta.mat"
TRUTH = Path("data") / "ILSVRC2012_validation_ground_truth.txt"
FILE = "ILSVRC2012_val_{:08d}.JPEG"


def missing_of_devkit(folder: Path) -> Path | None:
    """The first file that a folder lacks to be the development kit."""
    return next((file for file in (META, TRUTH) if not (folder / file).is_file()), None)


def validation_images(folder: Path, devkit: Path) -> ImageFiles:
    """The validation images, as their archive has them, in one flat folder; with WordNet ids as
    names of classes.

    The kit counts classes in an order of its own; ``meta.mat`` says which id each number is.

    Args:
        folder: the images, ILSVRC2012_val_00000001.JPEG and on.
        devkit: the folder of the kit.

    Raises:
        DataError: the kit cannot be read, or images are missing.
    """
    ids = _wordnet_ids(devkit / META)
    numbers = [int(line) for line in (devkit / TRUTH).read_text().split()]
    unknown = next((number for number in numbers if number not in ids), None)
    if unknown is not None:
        raise DataError(f"{devkit / TRUTH} must hold numbers of {META}, got {unknown}")

    files = [FILE.format(place) for place in range(1, len(numbers) + 1)]
    missing = [file for file in files if not os.path.lexists(folder / file)]
    if missing:
        raise DataError(
            f"{folder} must hold the {len(files)} images of {TRUTH}, got {len(missing)} that are "
            f"not there, the first {missing[0]}"
        )
    names = sorted(set(ids.values()))
    place = {name: at for at, name in enumerate(names)}
    labels = [place[ids[number]] for number in numbers]
    return ImageFiles(folder.resolve().name, folder, files, labels, names)


def _wordnet_ids(meta: Path) -> dict[int, str]:
    """The kit's number of a class → its WordNet id, of classes that have no classes below them."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise DataError(f"{meta} is read by scipy: pip install scipy ({error})") from error
    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
        leaves = [row for row in np.atleast_1d(synsets) if int(row["num_children"]) == 0]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except (MatReadError, ValueError, KeyError, IndexError, OSError, TypeError) as error:
        raise DataError(f"{meta} must be the meta.mat of ILSVRC 2012: {error}") from error
