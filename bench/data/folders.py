"""A folder of images, whose labels are its sub-folders or a table in it."""

from pathlib import Path

from ironmoe.attacks.data import DataError, ImageFiles, image_folder, labelled_files
from ironmoe.attacks.data.files import class_names, files_below, is_image
from ironmoe.attacks.data.label_tables import files_listed, usual_tables


def images_of_folder(folder: Path) -> ImageFiles:
    """The images in the sub-folders, or those that a table in the folder lists.

    Where there are both, the table counts if it is about all of them: it lists images that lie
    beside the sub-folders, or all images of each sub-folder of which it lists any. Others, such as
    a list of the classes, or what somebody noted of a few images, leave the sub-folders to be the
    classes, and a note says so.

    Raises:
        DataError: it is no set of images; or there are several tables, and one of them lists
            images.
    """
    tables = usual_tables(folder)
    inside = {name: _images(folder, name) for name in class_names(folder)} if tables else {}
    if not any(inside.values()):
        return labelled_files(folder) if tables else image_folder(folder)

    listed = {table: files_listed(folder, table) for table in tables}
    if any(_is_about_all(files, inside) for files in listed.values()):
        counting = [table for table, files in listed.items() if files]
        if len(counting) == 1:
            return labelled_files(folder, counting[0])
        raise DataError(
            f"{folder} must hold one table of labels, such as labels.csv, got "
            f"{[table.name for table in counting]}; name it by --labels"
        )

    images = image_folder(folder)
    images.notes += [
        f"{table.name} was not used, since it lists {len(files) or 'none'} of the images and the "
        f"sub-folders are classes; --labels {table} takes it."
        for table, files in listed.items()
    ]
    return images


def _images(folder: Path, name: str) -> set[str]:
    """The images in a sub-folder, as paths below the folder."""
    return {f"{name}/{file}" for file in files_below(folder / name) if is_image(Path(file).name)}


def _is_about_all(listed: set[str], inside: dict[str, set[str]]) -> bool:
    """Whether a table that lists these files leaves no image of a sub-folder out, or is about
    images beside the sub-folders."""
    if any("/" not in file for file in listed):
        return True
    touched = [images for images in inside.values() if images & listed]
    return bool(touched) and all(images <= listed for images in touched)
