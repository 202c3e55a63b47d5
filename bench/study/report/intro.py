"""What was asked, and of which models, in one paragraph of counted facts."""

from collections import Counter
from collections.abc import Sequence

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.verdict import Verdict
from ironmoe.bench.study.claims.parts.words import listed, number
from ironmoe.bench.study.report.arms import largest_difference
from ironmoe.bench.study.report.runs import StudyRuns

PAPER = "Puigcerver et al., “On the Adversarial Robustness of Mixture of Experts” (NeurIPS 2022)"
ORDER = ("supported", "against", "undecided", "not measured")


def intro(runs: StudyRuns, verdicts: Sequence[Verdict]) -> list[str]:
    """Paragraphs."""
    if not runs.count():
        return ["Nothing was measured yet."]
    claims = len({verdict.claim for verdict in verdicts})
    asked = (
        f"{counted(claims, 'claim')} after {PAPER}, put as docs/paper.md says, "
        f"{'was' if claims == 1 else 'were'} asked of "
        f"{counted(runs.count(), 'model')} of {_arms(runs)}, {_seeds(runs)}, "
        f"{_trainings(runs)}. {_data(runs)} {_cost(runs)}"
    )
    return [asked.strip(), answers(verdicts)]


def answers(verdicts: Sequence[Verdict]) -> str:
    """How many verdicts of each kind."""
    counts: Counter[str] = Counter(verdict.verdict for verdict in verdicts)
    parts = [f"{counts[answer]} {answer}" for answer in ORDER if counts[answer]]
    return f"Of {counted(len(verdicts), 'verdict')}: {listed(parts)}." if parts else ""


def _arms(runs: StudyRuns) -> str:
    arms = runs.arms
    dense = sum(arm.is_dense for arm in arms)
    counts = sorted({arm.experts for arm in arms if not arm.is_dense})
    kinds = [f"{dense} dense"] * bool(dense)
    if counts:
        gates = {False: "the gates of the source", True: "gates that sum to 1"}
        found = [text for kind, text in gates.items() if _with_gates(runs, kind)]
        experts = listed(counts)
        kinds.append(f"{len(arms) - dense} with E = {experts} experts and {listed(found, 'or')}")
    return f"{counted(len(arms), 'arm')} ({', '.join(kinds)})"


def _with_gates(runs: StudyRuns, renormalize: bool) -> bool:
    return any(arm.renormalize == renormalize for arm in runs.arms if not arm.is_dense)


def _seeds(runs: StudyRuns) -> str:
    seeds = {s for each in runs.trainings for arm in runs.arms for s in runs.seeds(each, arm)}
    return counted(len(seeds), "seed")


def _trainings(runs: StudyRuns) -> str:
    named = listed([f"“{name}”" for name in runs.trainings])
    if runs.facts.handed_in:
        return f"trained elsewhere ({named})"
    return f"trained as {named}"


def _data(runs: StudyRuns) -> str:
    facts = runs.facts
    return (
        f"All were asked about the same test images of “{facts.data}” "
        f"({counted(facts.test_images, 'image')}, {facts.classes} classes)."
    )


def _cost(runs: StudyRuns) -> str:
    difference = largest_difference(runs.facts)
    if difference is None:
        return ""
    return (
        "FLOPs were counted: arms at equal cost differ from the dense one by at most "
        f"{number(100 * difference, 2)} %."
    )
