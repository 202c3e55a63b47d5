"""The arms as tables: what they are, and what was measured of them."""

from collections.abc import Callable
from typing import NamedTuple

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.tables import Column, cells, headers
from ironmoe.bench.study.claims.parts.ladders import dense_arm
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.cells import DASH, mean_and_sd
from ironmoe.bench.study.report.facts import ArmFacts, StudyFacts
from ironmoe.bench.study.report.runs import StudyRuns


class Outcome(NamedTuple):
    """A column. header: with the unit; key: of the number, {} for the one radius; images: the
    setting of a budget that says of how many it is; scale: what it is multiplied by; digits: behind
    the point."""

    header: str
    key: str
    images: str
    scale: float = 1.0
    digits: int = 2


PERCENT = (100.0, 1)
JUMP = "jump"
OUTCOMES = (
    Outcome("clean, %", "clean", "clean_images", *PERCENT),
    Outcome("PGD, mean over radii, %", "auc", "images", *PERCENT),
    Outcome("PGD at {}, %", "pgd@{}", "images", *PERCENT),
    Outcome("PGD.vmoe at {}, %", "vmoe@{}", "paper_images", *PERCENT),
    Outcome("clipped PGD.vmoe at {}, %", "vmoe-clipped@{}", "paper_images", *PERCENT),
    Outcome("APGD-CE at {}, %", "apgd-ce@{}", "targeted_images", *PERCENT),
    Outcome("APGD-T at {}, %", "apgd-t@{}", "targeted_images", *PERCENT),
    Outcome("least radius, 1/255", "least_eps", "local_images"),
    Outcome("r₁, 1/255", "r1", "local_images"),
    Outcome("‖J‖₂", "jacobian", "local_images"),
    Outcome("‖J‖ through gates, %", "gate_share", "local_images", *PERCENT),
    Outcome("γ by rerouting at {}, %", "gamma@{}:share", "swap_images", *PERCENT),
    Outcome("sum of gates", "gate_sum", "images"),
    Outcome("experts in use, exp(entropy)", "load_entropy", "images"),
    Outcome("experts without tokens", "dormant", "images"),
    Outcome("1 − IoU of the routing at {}, %", "routing@{}:kept", "paper_images", *PERCENT),
    Outcome("distance of top experts", "top_distance", "local_images", 1.0, 3),
    Outcome("nearest swap, 1/255", "swap", "swap_images", 1.0, 3),
    Outcome("jump there", JUMP, "swap_images", 1.0, 4),
    Outcome("layer's J through experts, share", "expert_term", "local_images"),
    Outcome("layer's J through gates, share", "gate_term", "local_images"),
    Outcome("certified radius, L2, pixel range 1", "certified radius", "certified_images", 1.0, 3),
)


class Table(NamedTuple):
    """title: above it; headers: of its columns; rows: their cells."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def outcome_tables(runs: StudyRuns) -> list[Table]:
    """For each training means ± sd over runs, of the outcomes that any of its runs has."""
    return [_outcomes(runs, training) for training in runs.trainings]


def _outcomes(runs: StudyRuns, training: str) -> Table:
    budget = runs.budget(training)
    radius, most = exact(budget.radius), runs.facts.test_images
    arms = [arm for arm in runs.arms if runs.seeds(training, arm)]
    measured = [
        outcome._replace(
            header=f"{outcome.header.replace('{}', f'{radius}/255')}; "
            f"{min(most, getattr(budget, outcome.images))}",
            key=outcome.key.replace("{}", radius),
        )
        for outcome in OUTCOMES
    ]
    measured = [each for each in measured if any(runs.values(training, a, each.key) for a in arms)]
    rows = [
        [
            arm.name,
            str(len(runs.seeds(training, arm))),
            *(_cell(runs, training, arm, each) for each in measured),
        ]
        for arm in arms
    ]
    return Table(training, ["arm", "runs", *(each.header for each in measured)], rows)


def _cell(runs: StudyRuns, training: str, arm: Arm, outcome: Outcome) -> str:
    """With how many runs have the number, where not all do."""
    if outcome.key == JUMP and arm.experts == arm.top_k:
        return DASH  # no expert can be swapped
    found = runs.values(training, arm, outcome.key)
    text = mean_and_sd([outcome.scale * value for value in found.values()], outcome.digits)
    return f"{text} ({len(found)})" if 0 < len(found) < len(runs.seeds(training, arm)) else text


def arms_table(runs: StudyRuns) -> Table:
    """What each arm is and costs, and how many runs it has."""
    dense = dense_arm(runs.arms)
    base = None if dense is None else runs.facts.of_arm(dense.name)
    columns: tuple[Column[ArmFacts], ...] = (
        Column("arm", lambda each: each.arm.name),
        Column("E", _unless_dense(lambda arm: str(arm.experts))),
        Column("K", _unless_dense(lambda arm: str(arm.top_k) if arm.top_k else DASH)),
        Column("gates", _unless_dense(lambda arm: "sum to 1" if arm.renormalize else "source")),
        Column("MFLOP an image", lambda each: f"{each.flops / 1e6:.3g}"),
        Column("against dense", lambda each: _against(each, base)),
        Column("equal cost", lambda each: "no" if each.arm.equal_width else "yes"),
        Column("parameters", lambda each: f"{each.parameters:,}"),
        *(
            Column[ArmFacts](f"runs, {training}", _count(runs, training))
            for training in runs.trainings
        ),
    )
    rows = [cells(columns, each) for each in runs.facts.arms]
    return Table("The arms", headers(columns), rows)


def _unless_dense(text: Callable[[Arm], str]) -> Callable[[ArmFacts], str]:
    return lambda each: DASH if each.arm.is_dense else text(each.arm)


def _count(runs: StudyRuns, training: str) -> Callable[[ArmFacts], str]:
    return lambda each: str(len(runs.seeds(training, each.arm)))


def _against(each: ArmFacts, base: ArmFacts | None) -> str:
    if base is None or each is base:
        return DASH
    return f"{100 * (each.flops / base.flops - 1):+.2f} %".replace("-", "−")


def largest_difference(facts: StudyFacts) -> float | None:
    """How far the FLOPs of any arm at equal cost are from those of the dense one, a share; None
    without a dense arm or another one."""
    dense = next((each for each in facts.arms if each.arm.is_dense), None)
    others = [each for each in facts.arms if not each.arm.is_dense and not each.arm.equal_width]
    if dense is None or not others:
        return None
    return max(abs(each.flops / dense.flops - 1) for each in others)
