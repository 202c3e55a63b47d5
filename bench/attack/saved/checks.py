"""The checks against false security that a run has made. A later call that makes fewer, because of
its options or its budget, keeps them."""

from ironmoe.attacks import RobustnessReport
from ironmoe.attacks.evaluation.checks.model_checks import no_room_for_checks
from ironmoe.attacks.evaluation.checks.outcome_checks import check_outcome
from ironmoe.attacks.evaluation.report import Flag
from ironmoe.bench.common.run_folder import RunFolder

FILE = "results/checks.json"


def all_checks(folder: RunFolder, report: RobustnessReport) -> list[Flag]:
    """Those of this call, and those of earlier ones that this one did not make. What checks say of
    the outcome is always about the outcome of now."""
    known = {flag["name"]: _flag(flag) for flag in folder.read(FILE) or []}
    skipped = no_room_for_checks().name
    now = {flag.name: flag for flag in report.checks}
    if known:
        now.pop(skipped, None)
        now = {flag.name: flag for flag in check_outcome(report)} | now

    flags = list((known | now).values())
    if flags and skipped not in now:
        folder.write(FILE, [flag._asdict() for flag in flags])
    return flags


def _flag(written: dict[str, object]) -> Flag:
    """A value that is no number was written as None."""
    value = written["value"]
    return Flag(
        name=str(written["name"]),
        tripped=bool(written["tripped"]),
        value=float(value) if isinstance(value, int | float) else float("nan"),
        message=str(written["message"]),
    )
