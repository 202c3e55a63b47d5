"""The checks against false security that a run has made. A later call that makes fewer, because of
its options or its budget, keeps them."""

from ironmoe.attacks import Flag, RobustnessReport
from ironmoe.attacks.evaluation.checks.model_checks import MODEL_CHECKS
from ironmoe.attacks.evaluation.checks.outcome_checks import check_outcome
from ironmoe.bench.common.run_folder import RunFolder

FILE = "results/checks.json"


def all_checks(folder: RunFolder, report: RobustnessReport) -> list[Flag]:
    """Those of this call, and those of earlier ones that this one did not make. What checks say of
    the outcome is always about the outcome of now."""
    known = {flag["name"]: Flag.from_dict(flag) for flag in folder.read(FILE) or []}
    now = {flag.name: flag for flag in report.checks}
    of_outcome = {flag.name: flag for flag in check_outcome(report)} if known else {}

    looked = any(flag.looked_at for name, flag in now.items() if name in MODEL_CHECKS)
    flags = list(((known | now if looked else now | known) | of_outcome).values())
    if flags:
        folder.write(FILE, [flag.as_dict() for flag in flags])
    return flags
