"""From what ``--data`` says to a set of images."""

from pathlib import Path

from ironmoe.attacks.data import (
    DataError,
    ImageSet,
    image_arrays,
    image_folder,
    labelled_files,
)
from ironmoe.attacks.data.label_tables import TABLES, has_usual_table
from ironmoe.bench.data.built_in import BUILT_IN

FORMS = (
    "a folder with one sub-folder a class, a folder with a table of labels, such a table, or an "
    ".npz file"
)

SKIP_BAD = "--skip-bad passes over such files"


def open_set(spec: str, labels: Path | None = None) -> ImageSet:
    """The set that ``--data`` names; images are read when they are asked for.

    Args:
        spec: the name of a set that is built in, or a path.
        labels: a table of labels for a flat folder.

    Raises:
        DataError: there is no such set, or it cannot be used.
    """
    if labels is not None:
        if not Path(spec).is_dir():
            raise DataError(f"--labels {labels} must come with a folder in --data, got {spec!r}")
        return labelled_files(spec, labels)

    if spec in BUILT_IN:
        return BUILT_IN[spec]()
    path = Path(spec)
    if path.is_dir():
        return labelled_files(path) if has_usual_table(path) else image_folder(path)
    if path.is_file() and path.suffix == ".npz":
        return image_arrays(path)
    if path.is_file() and path.suffix.lower() in TABLES:
        return labelled_files(path.parent, path)
    raise DataError(
        f"--data must be one of {', '.join(BUILT_IN)}, or {FORMS}, which exists, got {spec!r}"
    )
