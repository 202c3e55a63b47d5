"""What the numbers of an evaluation say and what they do not say, in sentences."""

from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.reports.cells import counted

MOST_NAMED = 10  # skipped images

UPPER_BOUND = (
    "Robust accuracy is an upper bound: it is what these attacks left standing. Other attacks, "
    "more steps or more restarts can only lower it. Intervals are 95 % Wilson intervals: how "
    "precisely these images measure this very model, not another training of it."
)


def words(outcome: EvaluationOutcome) -> list[str]:
    """A paragraph for each thing that there is to say."""
    paragraphs = (
        _at_chance(outcome),
        _random(outcome),
        _skipped(outcome),
        _unread(outcome),
        _tripped(outcome),
        _ended_early(outcome),
        _confirmed(outcome),
        *outcome.remarks,
        UPPER_BOUND,
    )
    return [paragraph for paragraph in paragraphs if paragraph]


def _at_chance(outcome: EvaluationOutcome) -> str:
    clean, classes = outcome.report.clean_accuracy, len(outcome.images.classes)
    if classes < 2 or clean.value * classes > 1:
        return ""
    return (
        f"The clean accuracy, {clean}, is at or below chance, {100 / classes:.3g} % for {classes} "
        "classes: what is left under attack says nothing of robustness. Are the classes matched to "
        "the right logits, and are images in [0, 1] what the model expects?"
    )


def _random(outcome: EvaluationOutcome) -> str:
    passes = outcome.report.passes
    if passes == 1:
        return ""
    return (
        f"The model is random, so each verdict rests on {passes} passes: an image fell if a test "
        "with an error of at most 1 % says that the model is wrong in more than half of them. "
        "Accuracies are the expected ones of a single pass; their intervals allow for images and "
        "passes."
    )


def _skipped(outcome: EvaluationOutcome) -> str:
    skipped = [number for number in outcome.report.skipped if number not in outcome.unread]
    if not skipped:
        return ""
    places = outcome.rows_of_data[skipped].tolist()
    shown = ", ".join(map(str, places[:MOST_NAMED])) + " …" * (len(places) > MOST_NAMED)
    beside = " or an image of their group cannot be read" * bool(
        outcome.unread and outcome.together > 1
    )
    return (
        f"{counted(len(places), 'image')} skipped, because the model gives nothing finite there"
        f"{beside} (in the data number {shown}), and counted as neither robust nor fallen."
    )


def _unread(outcome: EvaluationOutcome) -> str:
    unread = sorted(outcome.unread)
    if not unread:
        return ""
    shown = "; ".join(outcome.unread[number] for number in unread[:MOST_NAMED])
    more = "; report.json names the others" * (len(unread) > MOST_NAMED)
    are = "is" if len(unread) == 1 else "are"
    return (
        f"{counted(len(unread), 'image')} {are} left out, as neither robust nor fallen: "
        f"{shown}{more}."
    )


def _tripped(outcome: EvaluationOutcome) -> str:
    tripped = [flag for flag in outcome.checks if flag.tripped]
    if not tripped:
        return ""
    messages = [f"{flag.name[0].upper()}{flag.name[1:]}: {flag.message}" for flag in tripped]
    return (
        f"{len(tripped)} of {len(outcome.checks)} checks against false security tripped: the model "
        f"may be weaker than it looks. {' '.join(messages)}"
    )


def _ended_early(outcome: EvaluationOutcome) -> str:
    if outcome.report.complete:
        return ""
    attacks = outcome.report.attacks.values()
    undecided = sum(int((~summary.decided).sum()) for summary in attacks)
    missed = len(outcome.images) - outcome.reached
    not_reached = (
        f", and {missed} of {len(outcome.images)} images were not reached and are not counted"
        if missed
        else ""
    )

    return (
        "A budget ended the evaluation early: "
        f"{undecided} of {outcome.reached * len(attacks)} {_noun(outcome)}s are undecided. What ≤ "
        "is written before counts them as robust, and its interval reaches down to where they all "
        f"fall{not_reached}. The same command goes on from here."
    )


def _confirmed(outcome: EvaluationOutcome) -> str:
    costs = [outcome.cost(name) for name in outcome.report.attacks]
    found, confirmed = sum(cost.found for cost in costs), sum(cost.confirmed for cost in costs)
    noun = _noun(outcome)
    if not found:
        return "The search reported no success."

    if found == 1:
        successes = (
            f"The search reported a success for one {noun}, and it was "
            f"{'not ' * (not confirmed)}confirmed"
        )
    else:
        successes = (
            f"The search reported successes for {found} {noun}s, and {confirmed} "
            f"{'was' if confirmed == 1 else 'were'} confirmed"
        )

    return (
        f"{successes}: predicted again in full precision by the plain model, and measured again in "
        "float64. Only what is confirmed counts."
    )


def _noun(outcome: EvaluationOutcome) -> str:
    return "(image, attack) pair" if len(outcome.report.attacks) > 1 else "image"
