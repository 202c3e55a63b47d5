"""A report in a folder: report.json with every number, the pictures, and report.html, one file that
holds everything."""

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib.figure import Figure

from ironmoe.bench.common.files import write_atomically, write_json
from ironmoe.bench.common.machine.provenance import provenance
from ironmoe.bench.common.machine.sessions import mixed
from ironmoe.bench.common.run_folder import sessions_of
from ironmoe.bench.reports.style import save_picture


class Picture(NamedTuple):
    """title: the heading above it; note: a sentence under the heading, or nothing; figure: what is
    drawn; text: what is to be seen, with its numbers, for those who do not see it."""

    title: str
    note: str
    figure: Figure
    text: str


def write_report(
    folder: Path,
    numbers: dict[str, Any],
    pictures: dict[str, Picture],
    *,
    room: str,
    **values: Any,
) -> None:
    """Write report.json, the PNGs and report.html into ``folder``.

    Args:
        numbers: what report.json holds: "title", "settings", "versions", "device" and more. "made"
            is added, which is the date, commit, command line and machine of the last call that
            measured something; "sessions", the same of all such calls; "mixed", what differs
            between them in words; and "written", when the report was.
        pictures: by file name.
        room: the sub-package of bench whose report.html.jinja fills the blocks of
            page.html.jinja.
        values: what the templates need beside the numbers.
    """
    written = provenance()
    sessions = sessions_of(folder) or [written]
    numbers = numbers | {
        "made": sessions[-1],
        "sessions": sessions,
        "mixed": mixed(sessions),
        "written": written["date"],
    }
    write_json(folder / "report.json", numbers)
    for name, picture in pictures.items():
        save_picture(picture.figure, folder / name)

    html = template(room).render(
        numbers=numbers,
        pictures=[
            (p.title, p.note, p.text, data_uri(folder / name)) for name, p in pictures.items()
        ],
        settings=[
            (key, json.dumps(value, ensure_ascii=False))
            for key, value in numbers["settings"].items()
        ],
        **values,
    )
    write_atomically(folder / "report.html", html)


def template(room: str) -> jinja2.Template:
    """The page, with the blocks of this sub-package of bench."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader(f"ironmoe.bench.{room}", ""),
                jinja2.PackageLoader("ironmoe.bench.reports", ""),
            ]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja")


def data_uri(file: Path) -> str:
    """A PNG as part of an HTML file."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
