"""Sentences of captions, each with its numbers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.words import number
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.runs import StudyRuns


def of_runs(runs: StudyRuns) -> str:
    """How many runs an arm has: "8 runs an arm", "2 to 3 runs an arm"."""
    counts = {
        len(seeds)
        for training in runs.trainings
        for arm in runs.arms
        if (seeds := runs.seeds(training, arm))
    }
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{counted(most, 'run') if least == most else f'{least} to {most} runs'} an arm"


def thin_and_thick(runs: StudyRuns) -> str:
    """What lines are, and what so many can show."""
    if all(len(runs.seeds(each, arm)) < 2 for each in runs.trainings for arm in runs.arms):
        return "There is one run an arm, so nothing is known of how much runs scatter."
    return f"Thin lines are runs, thick ones their means ({of_runs(runs)})."


def same_cost(runs: StudyRuns, arms: Iterable[Arm]) -> str:
    """How much the counted FLOPs of arms differ that are shown as equal in cost."""
    flops = [facts.flops for arm in arms if (facts := runs.facts.of_arm(arm.name)) is not None]
    if len(flops) < 2:
        return ""
    return f"FLOPs of these arms differ by at most {number(100 * (max(flops) / min(flops) - 1))} %."


def in_trainings(runs: StudyRuns, sentence: Callable[[str], str]) -> str:
    """The sentence about each training on a line of its own, with its name in front; those without
    numbers are left out."""
    found = [(training, sentence(training)) for training in runs.trainings]
    return "".join(f"\n{training}: {text}." for training, text in found if text)


def means(
    runs: StudyRuns, training: str, arms: Iterable[Arm], key: str, scale: float = 1.0
) -> dict[str, float]:
    """Arm → the mean over its runs, for the arms that have the number."""
    found = {arm.name: runs.values(training, arm, key) for arm in arms}
    return {name: scale * fmean(each.values()) for name, each in found.items() if each}


def between(of_arms: Mapping[str, float], digits: int = 1, unit: str = "") -> str:
    """ "38.1 % (E32) to 45.0 % (dense)"; one arm: "38.1 % (E32)"."""
    low, high = min(of_arms, key=of_arms.__getitem__), max(of_arms, key=of_arms.__getitem__)
    texts = [f"{number(of_arms[name], digits)}{unit} ({name})" for name in (low, high)]
    return texts[0] if len(of_arms) == 1 else f"{texts[0]} to {texts[1]}"


def sentences(*texts: str) -> str:
    """Those that are there, one after another."""
    return " ".join(text for text in texts if text).replace(" \n", "\n")


def spread_of(values: Sequence[float], digits: int) -> str:
    """ "0.12, −0.03 to 0.30 in 8 runs": the mean, then the least and the most."""
    mean, least, most = (number(each, digits) for each in (fmean(values), min(values), max(values)))
    if len(values) == 1:
        return f"{mean} in one run"
    return f"{mean}, {least} to {most} in {len(values)} runs"
