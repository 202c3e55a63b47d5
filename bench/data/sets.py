"""From what ``--data`` says to a set of images."""

from collections.abc import Mapping
from pathlib import Path

from ironmoe.attacks.data import (
    DataError,
    ImageSet,
    ImageStream,
    LoaderStream,
    image_arrays,
    labelled_files,
    parquet_images,
    saved_dataset,
)
from ironmoe.attacks.data.huggingface import is_saved_dataset
from ironmoe.attacks.data.label_tables import TABLES
from ironmoe.attacks.data.parquet import is_parquet, parquet_files
from ironmoe.attacks.robustbench.imagenet import imagenet_images
from ironmoe.bench.common.choices import did_you_mean, named
from ironmoe.bench.common.query import split_query
from ironmoe.bench.data.built_in import BUILT_IN
from ironmoe.bench.data.devkit import missing_of_devkit, validation_images
from ironmoe.bench.data.folders import images_of_folder
from ironmoe.bench.data.functions import data_of_function

FORMS = (
    "a folder with one sub-folder a class, a folder with a table of labels, such a table, an .npz "
    "file, a .parquet file or a folder of them, a folder that Hugging Face's datasets saved, or "
    "package.module:function"
)
SKIP_BAD = "--skip-bad passes over such files"
ROBUSTBENCH = "robustbench"
"""For ``--labels``: RobustBench's list of 5,000 validation images of ImageNet."""

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")

COLUMNS = ("split", "image", "label")
"""What may follow the name of a table of Hugging Face's: ``FOLDER?split=validation``."""

AnyData = ImageSet | ImageStream | LoaderStream


def open_data(spec: str, labels: Path | None = None) -> AnyData:
    """What ``--data`` names: a set, whose images are read when they are asked for; or a stream, if
    a user's function returns one.

    Args:
        spec: the name of a set that is built in, a path, or package.module:function; then perhaps
            ``?key=value``.
        labels: for a folder: a table of its labels, "robustbench" for RobustBench's 5,000 images of
            ImageNet, or the folder of ImageNet's development kit.

    Raises:
        DataError: there is no such set, or it cannot be used.
    """
    if labels is not None:
        if not Path(spec).is_dir():
            raise DataError(f"--labels {labels} must come with a folder in --data, got {spec!r}")
        return _labelled(Path(spec), labels)
    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    if Path(spec).exists():
        return _of_path(Path(spec), {}, spec)

    if named(spec, BUILT_IN) in BUILT_IN:
        return BUILT_IN[named(spec, BUILT_IN)]()

    name, query = split_query(spec, "--data")
    if Path(name).exists():
        return _of_path(Path(name), query, spec)
    if ":" in name and not name.startswith((".", "/")):
        return data_of_function(name, query)
    raise DataError(
        f"--data must be one of {', '.join(BUILT_IN)}, or {FORMS}, which exists, got {spec!r}"
        f"{did_you_mean(spec, BUILT_IN)}"
    )


def open_set(spec: str, labels: Path | None = None) -> ImageSet:
    """As ``open_data``, for commands that need images by their number.

    Raises:
        DataError: also where a function returns a loader or batches.
    """
    found = open_data(spec, labels)
    if isinstance(found, ImageStream | LoaderStream):
        raise DataError(
            f"--data {spec} must be a set with images by number for this command, such as a "
            f"torch.utils.data.Dataset, got {type(found).__name__}"
        )
    return found


def _labelled(folder: Path, labels: Path) -> ImageSet:
    """A flat folder, with what names its labels."""
    if str(labels) == ROBUSTBENCH:
        try:
            return imagenet_images(folder)
        except FileNotFoundError as error:
            raise DataError(str(error)) from error
    if not labels.exists() or labels.name.endswith(ARCHIVES):
        unpack = ", an archive: unpack it" if labels.exists() else ", which does not exist"
        raise DataError(
            f"--labels must be a table, {ROBUSTBENCH!r}, or the folder of ImageNet's development "
            f"kit, got {labels}{unpack}"
        )
    if labels.is_dir():
        missing = missing_of_devkit(labels)
        if missing:
            raise DataError(
                f"--labels must be a table, {ROBUSTBENCH!r}, or the folder of ImageNet's "
                f"development kit, got the folder {labels} without {missing}"
            )
        return validation_images(folder, labels)
    return labelled_files(folder, labels)


def _of_path(path: Path, query: Mapping[str, str], spec: str) -> ImageSet:
    """The set in a file or folder."""
    is_table = is_parquet(path.name) or (
        path.is_dir() and _holds_parquet(path, query.get("split", ""))
    )
    is_saved = path.is_dir() and is_saved_dataset(path)
    if query and not (is_table or is_saved):
        raise DataError(f"--data {spec} must name a parquet or saved data set to take a query")
    unknown = [key for key in query if key not in COLUMNS]
    if unknown:
        raise DataError(f"--data {spec} may set {', '.join(COLUMNS)}, got {unknown[0]!r}")

    if is_saved or is_table:
        try:
            return saved_dataset(path, **query) if is_saved else parquet_images(path, **query)
        except DataError as error:
            asked = [key for key in COLUMNS if key not in query and _asks_for(key, str(error))]
            known = "".join(f"{key}={value}&" for key, value in query.items())
            hints = [f"; --data '{path}?{known}{key}=NAME' says which" for key in asked]
            raise DataError(f"{error}{''.join(hints)}") from error
    if path.is_dir():
        try:
            return images_of_folder(path)
        except DataError as error:
            if not any(path.glob("ILSVRC2012_val_*")):
                raise
            raise DataError(
                f"{error}. These look like ImageNet's validation images: --labels {ROBUSTBENCH}, "
                "or --labels with the folder of the development kit"
            ) from error
    if path.suffix.lower() == ".npz":
        return image_arrays(path)
    if path.suffix.lower() in TABLES:
        return labelled_files(path.parent, path)
    raise DataError(f"--data must be {FORMS}, got the file {path}")


def _asks_for(key: str, error: str) -> bool:
    """Whether an error is that nobody said which split or column is meant."""
    return error.startswith(key) or f"name it by {key}=" in error


def _holds_parquet(folder: Path, split: str) -> bool:
    """Whether there are parquet files where ``parquet_images`` looks for them."""
    places = {folder, folder / "data", folder / split, folder / "data" / split}
    return any(parquet_files(place) for place in places)
