"""The folder of a run of ``ironmoe attack``, read again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ironmoe.attacks.results.accuracies import ACCURACY_KINDS
from ironmoe.attacks.results.image_rows import read_rows
from ironmoe.attacks.results.outcomes import Outcomes, outcomes_from
from ironmoe.attacks.results.rows_file import Row, read_text_rows
from ironmoe.bench.attack.saved.tables import IMAGES, TABLE
from ironmoe.bench.common.user_error import UserError


class RunError(UserError):
    """The folder holds no run that can be used; the message says why and what to do."""


class FinishedRun(NamedTuple):
    """What a run wrote.

    path: of its folder; report: the content of report.json.
    """

    path: Path
    report: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        return dict(self.report["settings"])

    @property
    def name(self) -> str:
        """Of its model."""
        return str(self.settings["name"])

    def outcomes(self, *, without: Sequence[str] = ()) -> Outcomes:
        """The run, image by image. ``without``: what of its rows is not to be compared with those
        of another run, "label" or "checksum", since it is another number for the same thing."""
        rows = [row | dict.fromkeys(without) for row in read_rows(self.path / IMAGES)]
        numbers = self.report["report"]
        radii = {
            name: tuple(at["eps"] for at in attack["curve"])
            for name, attack in numbers["attacks"].items()
        }
        return outcomes_from(rows, radii, numbers["complete"] and not numbers["unread"])

    def places(self) -> dict[int, int]:
        """Number of an image → its row in the data."""
        return {row["number"]: row["row"] for row in read_rows(self.path / IMAGES)}

    def accuracies(self) -> list[Row]:
        """The accuracies of the run."""
        return read_text_rows(self.path / TABLE, ACCURACY_KINDS)


def finished_run(path: Path) -> FinishedRun:
    """Open the folder of a run.

    Raises:
        RunError: it holds no run, one that has no report yet, or one of an earlier version.
    """
    if not (path / "settings.json").is_file():
        raise RunError(
            f"{path} must be the folder of a run of ironmoe attack, got no settings.json"
        )
    try:
        report = json.loads((path / "report.json").read_text())
        report["settings"]["attacks"]
        report["report"]["attacks"]
    except FileNotFoundError:
        raise RunError(
            f"{path} must hold a finished run, got one without a report; its command goes on from "
            "there"
        ) from None
    except KeyError:
        inside = path / "attack"  # where ironmoe train puts its attack
        hint = f"; take {inside}" if (inside / "report.json").is_file() else ""
        raise RunError(
            f"{path} must be the folder of a run of ironmoe attack, got that of another command"
            + hint
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{path} must be the folder of a run of ironmoe attack: {error!r}") from None

    missing = [name for name in (IMAGES, TABLE) if not (path / name).is_file()]
    if missing:
        raise RunError(
            f"{path} must hold {' and '.join(missing)}, which earlier versions did not write; the "
            "same command again writes them, and attacks nothing anew"
        )
    return FinishedRun(path, report)


def told_apart(runs: Sequence[FinishedRun]) -> list[str]:
    """The names of the models; with the folder where two are the same."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({run.path.resolve().name})"
        for name, run in zip(names, runs, strict=True)
    ]
