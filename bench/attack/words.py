"""What the numbers of an evaluation say and what they do not say, in sentences."""

from ironmoe.attacks import Flag
from ironmoe.attacks.evaluation.findings.flag import NOT_LOOKED_AT, TRIPPED, in_state
from ironmoe.attacks.evaluation.findings.verdict import verdict
from ironmoe.bench.attack.outcome import EvaluationOutcome
from ironmoe.bench.common.radii import exact
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
        at_chance(outcome),
        _random(outcome),
        _skipped(outcome),
        _unread(outcome),
        _tripped(outcome),
        _not_looked_at(outcome),
        _ended_early(outcome),
        _confirmed(outcome),
        *outcome.remarks,
        UPPER_BOUND,
    )
    return [paragraph for paragraph in paragraphs if paragraph]


def told_verdict(outcome: EvaluationOutcome) -> str:
    """The verdict of the run in one sentence, true while it is unfinished, too."""
    doubts = (
        ["the clean accuracy is not told from chance, so this says nothing of robustness"]
        if at_chance(outcome)
        else []
    )
    return verdict(
        outcome.report,
        radius=lambda eps: f"{exact(outcome.eps_255(eps))}/255",
        doubts=doubts,
    )


def images_told(outcome: EvaluationOutcome) -> str:
    """How many images every number is about, and why others are left out: "8 of 11 images (3
    skipped: 2 cannot be read, 1 gave nothing finite)"."""
    counts = outcome.report.clean_accuracy.total
    asked = len(outcome.images)
    if counts == asked:
        return counted(asked, "image")

    skipped = set(outcome.report.skipped)
    unread = len(skipped & outcome.unread.keys())
    attacked = len(outcome.report.skipped_under_attack)
    reasons = [
        f"{number} {why}"
        for number, why in (
            (unread, "cannot be read"),
            (len(skipped) - unread - attacked, "gave nothing finite"),
            (attacked, "gave nothing finite under attack alone"),
            (asked - outcome.reached, "not reached"),
        )
        if number
    ]
    left = asked - counts
    verb = "skipped" if skipped and outcome.reached == asked else "left out"
    return f"{counts} of {counted(asked, 'image')} ({left} {verb}: {', '.join(reasons)})"


def at_chance(outcome: EvaluationOutcome) -> str:
    """A paragraph for a model that may be no better than chance; empty for a better one, and where
    no image counts."""
    clean, classes = outcome.report.clean_accuracy, len(outcome.images.classes)
    if classes < 2 or not clean.total or clean.interval()[0] * classes > 1:
        return ""
    is_above = clean.value * classes > 1
    place = "cannot be told from" if is_above else "is at or below"
    return (
        f"The clean accuracy, {clean}, {place} chance, {100 / classes:.3g} % for {classes} "
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
        f"{_driven_to_nan(outcome)}"
    )


def _driven_to_nan(outcome: EvaluationOutcome) -> str:
    attacked = outcome.report.skipped_under_attack
    if not attacked:
        return ""
    accuracies = ", ".join(
        f"{outcome.report.if_skipped_fell_at(eps)} at {exact(outcome.eps_255(eps))}/255"
        for eps in next(iter(outcome.report.attacks.values())).eps
    )
    verb = "is" if len(attacked) == 1 else "are"
    return (
        f" {len(attacked)} of them {verb} finite without an attack: an attacker who may do so "
        f"drives the model to NaN there. Counted as fallen, they make the robust accuracy "
        f"{accuracies}."
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
    tripped = in_state(outcome.checks, TRIPPED)
    if not tripped:
        return ""
    return (
        f"{len(tripped)} of {len(outcome.checks)} checks against false security tripped: the model "
        f"may be weaker than it looks. {_listed(tripped)}"
    )


def _not_looked_at(outcome: EvaluationOutcome) -> str:
    if not outcome.checks:
        return "The checks against false security were not made."
    unseen = in_state(outcome.checks, NOT_LOOKED_AT)
    if not unseen:
        return ""
    return (
        f"{len(unseen)} of {len(outcome.checks)} checks against false security could not be made, "
        f"so they say nothing. {_listed(unseen)}"
    )


def _listed(flags: list[Flag]) -> str:
    return " ".join(f"{flag.name[0].upper()}{flag.name[1:]}: {flag.message}" for flag in flags)


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
        f"{undecided} of {outcome.reached * len(attacks)} {_noun(outcome)}s are undecided. An "
        "accuracy that they touch is a range, from where they all fall to where they all hold, and "
        f"its interval reaches as far{not_reached}. The same command goes on with them; attacks "
        "that were under way begin again at their images, so a budget must suffice for one batch."
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
