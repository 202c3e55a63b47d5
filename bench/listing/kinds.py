"""What each kind of run says of itself: a function from settings and report to a row."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ironmoe.bench.common.radii import exact
from ironmoe.bench.compare.better import radius_in_255
from ironmoe.bench.compare.finished_run import state_of
from ironmoe.bench.listing.found import read_json
from ironmoe.bench.reports.cells import counted

Numbers = Mapping[str, Any]
Row = dict[str, Any]
UNFINISHED = "unfinished"


def attack(folder: Path, settings: Numbers, report: Numbers) -> Row:
    """A run of ``ironmoe attack``."""
    chosen = settings["attacks"]
    about = {"model": settings.get("name"), "norm": chosen["norm"], "eps_255": chosen["eps_255"]}
    if not report:
        decided = _decided(folder / "results" / "journal")
        of = _pairs_asked(folder, settings.get("images"), len(chosen["names"]))
        pairs = f"{decided}{of} (image, attack) pairs decided"
        return about | {"complete": False, "state": f"{UNFINISHED}: {pairs}"}

    numbers = report["report"]
    pairs = sum(summary["undecided"] for summary in numbers["attacks"].values())
    missed = numbers["unread"]
    open_ = [f"{pairs} (image, attack) pairs undecided"] * bool(pairs)
    open_ += [f"{missed} images not reached"] * bool(missed)
    complete = bool(numbers["complete"]) and not open_
    verdict = _accuracies(
        numbers["clean"],
        report["worst_case"],
        [*_left_out(numbers), *_chance(report), *_tripped(numbers["checks"])],
    )
    if len(numbers.get("could_find_nothing", {})) == len(numbers["attacks"]):
        verdict = str(numbers["verdict"])
    return about | {
        "complete": complete,
        "state": "complete" if complete else f"{UNFINISHED}: {', '.join(open_)}",
        "verdict": verdict,
    }


def train(folder: Path, settings: Numbers, report: Numbers) -> Row:
    """A run of ``ironmoe train``."""
    method = settings["method"]
    eps = method.get("eps_255")
    about = {
        "model": settings.get("name") or method.get("name"),
        "norm": method.get("norm"),
        "eps_255": None if eps is None else [eps],
    }
    if not report:
        return about | _without_report(folder)
    found = report.get("attack")
    verdict = "" if not found else _accuracies(found["clean"], found["worst_case"], _chance(found))
    return about | {"complete": True, "state": "complete", "verdict": verdict}


def demo(folder: Path, settings: Numbers, report: Numbers) -> Row:
    """A run of ``ironmoe demo``."""
    chosen = settings["attack"]
    about = {"norm": chosen.get("norm"), "eps_255": chosen.get("eps_255")}
    if not report:
        return about | _without_report(folder)
    words = report.get("verdict") or [""]
    return about | {
        "model": ", ".join(report.get("models", {})),
        "complete": True,
        "state": "complete",
        "verdict": words if isinstance(words, str) else str(words[0]),
    }


def study(folder: Path, settings: Numbers, report: Numbers) -> Row:
    """A run of ``ironmoe study``."""
    about = {"model": ", ".join(settings.get("models") or []) or None}
    if not report:
        return about | _without_report(folder)
    trained = counted(len(report.get("runs", [])), "model")
    return about | {"complete": True, "state": "complete", "verdict": f"{trained} measured"}


def bench(folder: Path, settings: Numbers, report: Numbers) -> Row:
    """Rows of a benchmark; ``report`` is their file, which does not say how many were asked for."""
    rows = counted(len(report["rows"]), "row")
    return {"complete": None, "state": rows, "verdict": str(report["benchmark"])}


def kind_of(settings: Numbers, report: Numbers) -> str | None:
    """The name of the kind, a key of ``KINDS``; None for a folder of something else."""
    if {"benchmark", "rows"} <= report.keys():
        return "bench"
    signs = {
        "attack": {"attacks", "weights"},
        "train": {"method", "recipe"},
        "demo": {"recipe", "seeds", "attack"},
        "study": {"training", "models"},
    }
    found = [kind for kind, keys in signs.items() if keys <= settings.keys()]
    return found[0] if found else "study" if "joined" in settings else None


KINDS: dict[str, Callable[[Path, Numbers, Numbers], Row]] = {
    "attack": attack,
    "train": train,
    "demo": demo,
    "study": study,
    "bench": bench,
}


def _accuracies(clean: Numbers, worst: Iterable[Numbers], doubts: Sequence[str]) -> str:
    """Such as "83.3 % clean, 66.7 % at 8/255; 1 check tripped"."""
    parts = [f"{_share(clean)} clean"]
    parts += [f"{_share(each)} at {exact(each['eps_255'])}/255" for each in worst]
    return "; ".join([", ".join(parts), *doubts])


def _left_out(numbers: Numbers) -> list[str]:
    """What the accuracies of an attack leave out, since nothing finite came of it. Earlier versions
    did not tell one kind from the other."""
    skipped, driven = (len(numbers.get(key, ())) for key in ("skipped", "skipped_under_attack"))
    found = []
    if skipped > driven:
        apart = " without any attack" * ("skipped_under_attack" in numbers)
        found.append(f"{counted(skipped - driven, 'image')} skipped{apart}")
    if driven:
        fallen = [
            f"{_share(each)} at {radius_in_255(each['eps'])}"
            for each in numbers.get("if_skipped_fell", ())
        ]
        found.append(
            f"{counted(driven, 'image')} skipped under attack alone, which makes it "
            f"{', '.join(fallen)} if they count as fallen"
        )
    return found


def _chance(report: Numbers) -> list[str]:
    return ["the clean accuracy is not told from chance"] * bool(report.get("at_chance"))


def _tripped(flags: Iterable[Numbers]) -> list[str]:
    tripped = sum(state_of(dict(flag)) == "tripped" for flag in flags)
    return [f"{counted(tripped, 'check')} tripped"] * bool(tripped)


def _pairs_asked(folder: Path, most: Any, attacks: int) -> str:
    """Such as " of at most 200": what the run noted when it began; a run of an earlier version did
    not, and there is the most that its command allows."""
    pairs = read_json(folder / "results" / "seconds.json").get("pairs")
    if not isinstance(pairs, int):
        pairs = most * attacks if isinstance(most, int) else None
    return "" if pairs is None else f" of at most {pairs}"


def _share(numbers: Numbers) -> str:
    """Of earlier versions, too, which took undecided images for robust."""
    value, undecided = numbers.get("value"), numbers.get("undecided")
    least, most = numbers.get("least", value), numbers.get("most", value)
    if most is None:
        return "–"
    if undecided and least == most:
        return f"at most {100 * most:.1f} %"
    return f"{100 * most:.1f} %" if least == most else f"{100 * least:.1f} to {100 * most:.1f} %"


def _without_report(folder: Path) -> Row:
    """How far a run is that has no report yet: the files of what is finished."""
    parts = [
        file
        for name in ("results", "checkpoints")
        for file in (folder / name).glob("*")
        if file.is_file() and not file.name.endswith(".partial")
    ]
    return {"complete": False, "state": f"{UNFINISHED}: {counted(len(parts), 'part')} finished"}


def _decided(journal: Path) -> int:
    """How many (image, attack) pairs a journal says are decided."""
    pairs = set()
    for file in sorted(journal.glob("journal-*.jsonl")):
        for line in file.read_bytes().splitlines()[1:]:
            try:
                records = json.loads(line)
            except ValueError:  # a line that a kill cut off
                continue
            pairs |= {
                (record.get("attack"), record.get("example"))
                for record in records
                if isinstance(record, dict) and record.get("decided")
            }
    return len(pairs)
