"""The checks against false security that a run has made. A later call that makes fewer, because of
its options or its budget, keeps them."""

from ironmoe.attacks import Flag, RobustnessReport
from ironmoe.attacks.evaluation.checks.model_checks import MODEL_CHECKS
from ironmoe.attacks.evaluation.checks.outcome_checks import check_outcome
from ironmoe.attacks.evaluation.findings.flag import NOT_LOOKED_AT, PASSED, TRIPPED
from ironmoe.bench.common.run_folder import RunFolder

FILE = "results/checks.json"
RANKS = {NOT_LOOKED_AT: 0, PASSED: 1, TRIPPED: 2}


def all_checks(folder: RunFolder, report: RobustnessReport) -> list[Flag]:
    """Those of this call and of earlier ones: a check that tripped stays so, since a later call
    looks at other images. What checks say of the outcome is about the outcome of now."""
    known = {flag["name"]: Flag.from_dict(flag) for flag in folder.read(FILE) or []}
    now = {flag.name: flag for flag in report.checks}
    of_outcome = {flag.name: flag for flag in check_outcome(report)} if known else {}

    looked = any(flag.looked_at for name, flag in now.items() if name in MODEL_CHECKS)
    first, second = (now, known) if looked else (known, now)
    made = {name: _worse(first.get(name), second.get(name)) for name in known | now}
    flags = list((made | of_outcome).values())
    if flags:
        folder.write(FILE, [flag.as_dict() for flag in flags])
    return flags


def _worse(flag: Flag | None, other: Flag | None) -> Flag:
    """That of the two calls which says more; the first one, where they say the same."""
    there = [one for one in (flag, other) if one is not None]
    return max(there, key=lambda one: RANKS[one.state])
