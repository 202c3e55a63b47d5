"""The results of a run for other programs: images.csv and images.jsonl with a row for each image
and attack, images.npz with the same columns as arrays, table.csv and table.tex with the accuracies.

Every radius and distance in them is in units of the range of a pixel: times 255 it is in units of
1/255."""

from pathlib import Path

from ironmoe.attacks import accuracies, latex_table, per_image
from ironmoe.attacks.results.rows_file import Row, rows_as_text
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.attack.saved.image_arrays import arrays_file
from ironmoe.bench.common.files import write_atomically

IMAGES = "images.jsonl"
TABLE = "table.csv"


def write_tables(folder: Path, outcome: EvaluationOutcome) -> None:
    """Write the five files into ``folder``."""
    images = image_rows(outcome)
    about = {"data": outcome.images.name, "norm": outcome.suite.norm}
    shares = [row | about for row in accuracies({outcome.name: outcome.report})]
    contents: dict[str, str | bytes] = {
        IMAGES: rows_as_text(images, ".jsonl"),
        "images.csv": rows_as_text(images, ".csv"),
        "images.npz": arrays_file(images),
        TABLE: rows_as_text(shares, ".csv"),
        "table.tex": latex_table(shares),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)


def image_rows(outcome: EvaluationOutcome) -> list[Row]:
    """``per_image`` of the report, where ``number`` counts the attacked images; and ``row``, the
    image's place in the data, counted from 0 (in a folder: class by class, files by name), with
    ``image``, its file below the folder, where it has one."""
    places = outcome.rows_of_data.tolist()
    files = outcome.images.files

    rows = []
    for row in per_image(outcome.report):
        place = places[row["number"]]
        where = {} if files is None else {"image": files[place]}
        known = {"attack": row["attack"], "number": row["number"], "row": place}
        rows.append(known | where | row)
    return rows
