"""What these runs can show and what they cannot, in sentences with their numbers."""

from collections.abc import Sequence

from scipy import special

from ironmoe.bench.common.radii import exact
from ironmoe.bench.common.statistics import t_half_width
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.ladders import (
    dense_arm,
    in_place_of_others,
    of_other_cost,
)
from ironmoe.bench.study.claims.parts.outcomes import ATTACKS
from ironmoe.bench.study.claims.parts.verdict import Verdict
from ironmoe.bench.study.claims.parts.words import listed, number
from ironmoe.bench.study.report.runs import StudyRuns
from ironmoe.bench.study.report.smallest import FEWEST_RUNS, claims_tested

ENOUGH_FOR_SIGNS = 6
USUAL = 8  # seeds
LITTLE = 0.02  # a share of images
ATTACKED = (*ATTACKS, "free")  # names of accuracies under attack

UNIT = (
    "The unit is the training run: tests and intervals are of differences between runs of one "
    "seed. {shared} No test takes an image for a run: on one pair of models a test over images "
    "says which of two files is better, not which architecture."
)
TRAINED_HERE = (
    "Runs of one seed share batches, attack seeds and the initial weights of the modules that both "
    "have."
)
HANDED_IN = (
    "The models were handed in and trained elsewhere, and seeds are those that were given with "
    "them; whether runs of one seed share batches or initial weights is not known here. If they do "
    "not, pairing is by chance: intervals stay right, only longer."
)
UPPER_BOUND = (
    "Accuracies under attack are upper bounds: what these attacks left standing. All are of the "
    "same images, so another set of images would move them together."
)
OUTSIDE = (
    "PGD.vmoe leaves the pixel range, as the official code does. Its accuracies are not to be "
    "compared with those of the other attacks, which stay inside; those of “clipped PGD.vmoe” are, "
    "the same images cut off at the ends of the range."
)
SOURCE = (
    "Gates of the source are those of V-MoE: a token's K largest shares of a softmax over all E "
    "experts, which sum to less than 1 where K < E. Arms whose gates sum to 1 tell the number of "
    "experts from the scale of the gates."
)
SOURCE_OF_OTHERS = (
    "Gates of a token that do not sum to 1 by the rule of its router are called those of the "
    "source, whatever that rule is."
)


def limits(runs: StudyRuns, verdicts: Sequence[Verdict]) -> list[str]:
    """A paragraph for each thing that there is to say."""
    if not runs.count():
        return _missing(runs)
    return [
        UNIT.format(shared=HANDED_IN if runs.facts.training is None else TRAINED_HERE),
        *_seeds(runs),
        *_holm(runs, verdicts),
        *[UPPER_BOUND] * any(map(runs.has, ATTACKED)),
        *[OUTSIDE] * runs.has("vmoe"),
        *_ends(runs),
        *_gates(runs),
        *_other_cost(runs),
        *_models(runs),
        *_doubles(runs),
        *_at_chance(runs),
        *_missing(runs),
        *(f"Not measured: {problem}" for problem in runs.facts.problems),
    ]


def _seeds(runs: StudyRuns) -> list[str]:
    counts = [len(runs.seeds(each, arm)) for each in runs.trainings for arm in runs.arms]
    seeds = max(counts, default=0)
    if seeds < 2:
        return [
            "With one seed there are no intervals and no tests: another seed could give another "
            "sign. The figures show these models and nothing else."
        ]
    reach, usual = (number(t_half_width(1.0, count), 2) for count in (seeds, USUAL))
    beside = "" if seeds == USUAL else f"; with {USUAL} seeds {usual}"
    low, high = (number(factor, 2) for factor in sd_factors(seeds))
    return [
        f"With {seeds} seeds a 95 % interval reaches {reach} standard deviations of the "
        f"differences to each side of their mean{beside}. How much runs scatter is itself known "
        f"only so well: the true standard deviation is {low} to {high} times the one that is found "
        f"(95 % interval, for normal differences). {_can_show(seeds)}"
    ]


def _can_show(seeds: int) -> str:
    least = f"p = {2 / 2**seeds:.5g}"
    if seeds >= ENOUGH_FOR_SIGNS:
        return f"A test by flipping signs, which takes nothing to be normal, can reach {least}."
    few = (
        f"{seeds} seeds can show large effects; that an effect is small or absent they can hardly "
        "show."
    )
    if seeds < FEWEST_RUNS:
        few = f"{seeds} seeds show that runs vary, and no verdict rests on them."
    return (
        f"A test by flipping signs cannot give less than {least}, so 5 % is out of its reach, and "
        "what verdicts there are rest on tests that take differences to be normal, or the arms of "
        f"a seed to be exchangeable. {few}"
    )


def sd_factors(runs: int) -> tuple[float, float]:
    """The ends of the 95 % interval of a standard deviation, in units of the one that was found,
    for numbers that are normal. runs: at least 2."""
    freedom = runs - 1
    high, low = (float(special.chdtri(freedom, tail)) for tail in (0.025, 0.975))
    return (freedom / high) ** 0.5, (freedom / low) ** 0.5


def _holm(runs: StudyRuns, verdicts: Sequence[Verdict]) -> list[str]:
    tested = {each: claims_tested(verdicts, each) for each in runs.trainings}
    if not any(tested.values()):
        return []
    counts = [f"{count} of {training}" for training, count in tested.items()]
    return [
        f"p (Holm) is corrected for all claims of a training that were tested ({listed(counts)}), "
        "and trainings are separate studies. p in the tables of contrasts is not corrected: "
        "secondary and exploratory contrasts are many, and some are small by chance."
    ]


def _ends(runs: StudyRuns) -> list[str]:
    """Radii at which nothing is left to compare."""
    texts = []
    for training in runs.trainings:
        for radius in runs.radii(training, "pgd"):
            found = [
                runs.values(training, arm, f"pgd@{exact(radius)}").values() for arm in runs.arms
            ]
            means = [sum(values) / len(values) for values in found if values]
            if means and (max(means) < LITTLE or min(means) > 1 - LITTLE):
                side = "below 2 %" if max(means) < LITTLE else "above 98 %"
                texts.append(f"at {exact(radius)}/255 ({training}) every arm is {side}")
    if not texts:
        return []
    return [f"Under PGD, {listed(texts)} on average: nothing can be told apart there."]


def _gates(runs: StudyRuns) -> list[str]:
    with_experts = [arm for arm in runs.arms if not arm.is_dense]
    source = SOURCE_OF_OTHERS if runs.facts.training is None else SOURCE
    texts = [source] if with_experts else []
    all_taken = [arm.name for arm in with_experts if arm.experts == arm.top_k]
    if all_taken:
        texts.append(
            f"Tokens of {listed(all_taken)} take all experts: the gates sum to 1 as they are, no "
            "expert can be swapped, and the arm stands in both ladders."
        )
    ones = [arm.name for arm in with_experts if arm.top_k == 1 and arm.renormalize]
    if ones:
        texts.append(
            f"Of {listed(ones)}, with K = 1 and gates that sum to 1, every gate is 1: the loss of "
            "the task trains no router there, and only balance losses do."
        )
    return texts


def _other_cost(runs: StudyRuns) -> list[str]:
    others = of_other_cost(runs.arms)
    dense = dense_arm(runs.arms)
    if not others:
        return []
    reference = runs.arms[0].name if dense is None else dense.name
    return [
        f"FLOPs of {listed([arm.name for arm in others])} are not those of {reference}: claims and "
        "figures at equal cost leave such models out. The tables have their numbers."
    ]


def _models(runs: StudyRuns) -> list[str]:
    facts = runs.facts
    if facts.training is None:
        return []
    size = facts.training["size"]
    return [
        f"The models have {size['depth']} blocks of width {size['dim']}, experts in the last "
        f"{size['moe_blocks']}, and were trained for {counted(facts.training['epochs'], 'epoch')}. "
        "What they show need not hold for models of other sizes and data, such as those of the "
        "paper."
    ]


def _doubles(runs: StudyRuns) -> list[str]:
    return [
        f"{double.name} has the experts, K, gates and cost of {first.name}: where claims and "
        f"figures ask how a number changes with E or K, {first.name} stands for both."
        for first, double in in_place_of_others(runs.arms)
    ]


def _at_chance(runs: StudyRuns) -> list[str]:
    chance = 1 / max(1, runs.facts.classes)
    found = [
        f"{arm.name}, {training}, seed {seed}"
        for training in runs.trainings
        for arm in runs.arms
        for seed, clean in runs.values(training, arm, "clean").items()
        if clean <= chance
    ]
    if not found:
        return []
    return [
        f"The clean accuracy of {listed(found)} is not above chance, {number(100 * chance)} %: "
        "numbers of these models say nothing of robustness."
    ]


def _missing(runs: StudyRuns) -> list[str]:
    """Measurements that were not asked for, and runs that are not there."""
    texts = []
    if runs.facts.not_asked:
        texts.append(f"Measurements not asked for: {listed(runs.facts.not_asked)}.")
    for training in runs.trainings:
        seeds = {seed for arm in runs.arms for seed in runs.seeds(training, arm)}
        short = [
            f"{arm.name} {len(found)}"
            for arm in runs.arms
            if len(found := runs.seeds(training, arm)) < len(seeds)
        ]
        if short:
            texts.append(f"Not all of {len(seeds)} seeds are there of {training}: {listed(short)}.")
    return texts
