"""Which of two runs is better, in the words of the command line: "PGD at 8/255 (Linf)"."""

from ironmoe.attacks import Comparison
from ironmoe.attacks.registry import named_attacks
from ironmoe.attacks.results.better import which_is_better
from ironmoe.attacks.results.comparison import where
from ironmoe.attacks.results.outcomes import CLEAN, WORST_CASE
from ironmoe.bench.common.radii import exact, to_255
from ironmoe.bench.compare.finished_run import FinishedRun, told_apart


def better(runs: list[FinishedRun], comparison: Comparison) -> list[str]:
    """A sentence for the clean accuracy, and one for each radius of the worst case; under a single
    attack, of that one. None of a run beside itself."""
    if runs[0].path.resolve() == runs[1].path.resolve():
        return []
    names = told_apart(runs)
    worst = [line for line in comparison.lines if line.attack == WORST_CASE]
    attacked = worst or [line for line in comparison.lines if line.attack != CLEAN]
    shown = [line for line in comparison.lines if line.attack == CLEAN] + attacked
    sentences = []
    for line in shown:
        radius = None if line.eps is None else f"{radius_in_255(line.eps)} ({runs[0].norm})"
        place = where(line, attack_name(line.attack), radius)
        sentences.append(which_is_better(line.result, place, (names[0], names[1]), line.ends))
    return sentences


def same_run(runs: list[FinishedRun]) -> list[str]:
    """What to say where the runs are one, or of one model."""
    one, other = runs
    if one.path.resolve() == other.path.resolve():
        said = f"Both are the same run, {one.path}: every difference is 0."
        undecided = "Ranges say only that its undecided images may fall or hold."
        return [f"{said} {undecided}" if one.unfinished else said]
    if one.settings == other.settings:
        return ["Both runs have the same model and the same settings: they should be equal."]
    weights = [run.settings.get("weights") for run in runs]
    if weights[0] is not None and weights[0] == weights[1]:
        return ["Both runs are of the same model, with the same weights."]
    return []


def untried(runs: list[FinishedRun]) -> list[str]:
    """Which attacks of which run could find nothing, whatever the model is."""
    return [
        f"In {run.path} {attack} could find nothing, since {why}."
        for run in runs
        for attack, why in run.untried.items()
    ]


def attack_name(attack: str) -> str:
    """As papers write it: "PGD" for pgd; names that differ in more than case stay."""
    kind = named_attacks().get(attack)
    proper = "" if kind is None else kind.kind.__name__
    return proper if proper.lower() == attack else attack


def radius_in_255(eps: float) -> str:
    """A radius as people wrote it, such as "8/255": multiplied, 3/255 may not be 3."""
    return f"{exact(round(to_255(eps), 9))}/255"
