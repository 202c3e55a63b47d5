"""The results of a run for other programs: images.csv and images.jsonl with a row for each image
and attack, table.csv and table.tex with the accuracies."""

from pathlib import Path

from ironmoe.attacks import accuracies, latex_table, per_image
from ironmoe.attacks.results.rows_file import Row, rows_as_text
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.common.files import write_atomically

IMAGES = "images.jsonl"
TABLE = "table.csv"


def write_tables(folder: Path, outcome: EvaluationOutcome) -> None:
    """Write the four files into ``folder``."""
    images = image_rows(outcome)
    shares = accuracies({outcome.name: outcome.report})
    contents = {
        IMAGES: rows_as_text(images, ".jsonl"),
        "images.csv": rows_as_text(images, ".csv"),
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
