"""The folder of a run of ``ironmoe attack``, read again."""

import hashlib
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

# What the command line says of all attacks alike.
STRENGTH = ("seed", "alpha_255", "dtype", "routing", "levels")


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
        if any(row["skipped"] and "skipped_under_attack" not in row for row in rows):
            raise self._earlier(f"{IMAGES} without 'skipped_under_attack'")
        numbers = self.report["report"]
        radii = {
            name: tuple(at["eps"] for at in attack["curve"])
            for name, attack in numbers["attacks"].items()
        }
        return outcomes_from(rows, radii, numbers["complete"] and not numbers["unread"])

    def places(self) -> dict[int, int]:
        """Number of an image → its row in the data."""
        return {row["number"]: row["row"] for row in read_rows(self.path / IMAGES)}

    @property
    def norm(self) -> str:
        """In which the attacks were made."""
        return str(self.settings["attacks"]["norm"])

    @property
    def data(self) -> str:
        """The name of the data."""
        return str(self.settings["data"])

    @property
    def unfinished(self) -> str:
        """What a budget left open, as a clause; empty for a complete run."""
        numbers = self.report["report"]
        open_ = sum(attack["undecided"] for attack in numbers["attacks"].values())
        missed = numbers["unread"]
        parts = [f"{open_} (image, attack) pairs are undecided"] * bool(open_)
        parts += [f"{missed} images were not reached"] * bool(missed)
        return " and ".join(parts)

    @property
    def untried(self) -> dict[str, str]:
        """Attack → why it could find nothing, of those for which this is so."""
        return dict(self.report["report"].get("could_find_nothing", {}))

    @property
    def checks(self) -> str:
        """What the checks against false security say, as a clause."""
        flags = self.report["report"]["checks"]
        if not flags:
            return "checks against false security were not made"
        names = {
            state: [flag["name"] for flag in flags if state_of(flag) == state]
            for state in ("tripped", "not looked at")
        }
        tripped, unseen = names.values()
        text = f"{len(tripped)} of {len(flags)} checks tripped"
        text += f" ({', '.join(tripped)})" if tripped else ""
        return f"{text}, {len(unseen)} could not be made" if unseen else text

    def strength(self) -> dict[str, dict[str, Any]]:
        """Attack → every setting that makes it stronger or weaker, beside norm and radii."""
        common = {key: self.settings["attacks"].get(key) for key in STRENGTH}
        return {
            name: {
                (key if len(parts) == 1 else f"{part['name']}: {key}"): value
                for part in parts
                for key, value in part.items()
                if key != "name"
            }
            | common
            for name, parts in self.report["parts"].items()
        }

    def image_set(self) -> str:
        """A digest of which images of which data count, the same for runs on the same ones."""
        rows = read_rows(self.path / IMAGES)
        places = sorted({row["row"] for row in rows if not row["skipped"]})
        known = json.dumps([self.settings.get("checksum"), self.data, places])
        return hashlib.sha256(known.encode()).hexdigest()[:8]

    def accuracies(self) -> list[Row]:
        """The accuracies of the run, with the names of data and norm."""
        rows = read_text_rows(self.path / TABLE, ACCURACY_KINDS)
        needed = ["least", *["skipped_under_attack"] * bool(self.report["report"].get("skipped"))]
        missing = [name for name in needed if rows and name not in rows[0]]
        if missing:
            raise self._earlier(f"a table without {missing[0]!r}")
        about = {"data": self.data, "norm": self.norm}
        return [_nothing_skipped(row) | row | about for row in rows]

    def _earlier(self, what: str) -> RunError:
        return RunError(
            f"{self.path} must be a run of this version, got {what} of an earlier one; the same "
            "command again writes it, and attacks nothing anew"
        )


def _nothing_skipped(row: Row) -> Row:
    """What the row of an earlier version does not say where nothing was skipped."""
    ends = {f"{end}_if_skipped_fell": row[end] for end in ("least", "most")}
    return {"skipped": 0, "skipped_under_attack": 0} | ends


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


def state_of(flag: dict[str, Any]) -> str:
    """The state of a check in report.json, which earlier versions said in the message alone."""
    if "state" in flag:
        return str(flag["state"])
    if str(flag["message"]).startswith("Not looked at"):
        return "not looked at"
    return "tripped" if flag["tripped"] else "passed"
