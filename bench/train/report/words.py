"""What the numbers of a training show and what they cannot show, in sentences."""

from ironmoe.bench.train.report.facts import TrainingFacts

ONE_TRAINING = (
    "This is one training. The intervals are 95 % Wilson intervals: how precisely these images "
    "measure these very weights. They say nothing of another training with another seed, which can "
    "move robust accuracy by more than the interval is wide. So this run cannot show that a method "
    "or an architecture is better than another; several seeds of each can."
)
UPPER_BOUND = (
    "Robust accuracy is an upper bound: it is what APGD-T left standing. A stronger attack can "
    "only lower it; ironmoe attack --attack autoattack on the same weights is the next step."
)
NOT_ATTACKED = (
    "The weights were not attacked on test images. Accuracy on the images of the training's own "
    "attack, or on held-out images that chose the weights, is no result: run ironmoe attack."
)


def words(facts: TrainingFacts) -> list[str]:
    """A paragraph for each thing that there is to say."""
    paragraphs = [*facts.training["warnings"], *_at_chance(facts), _chosen(facts)]
    if facts.attack is None:
        return [*paragraphs, NOT_ATTACKED]
    return [*paragraphs, ONE_TRAINING, UPPER_BOUND, *_tripped(facts)]


def _at_chance(facts: TrainingFacts) -> list[str]:
    """That the model has learned nothing, where the held-out images do not show otherwise."""
    if facts.chosen["learned"]:
        return []
    return [
        f"The clean accuracy of held-out images, {facts.clean_held_out}, cannot be told from "
        f"chance, {100 * facts.chosen['chance']:.3g} % for {facts.classes} classes answered as "
        "often as by this model, in random order: these images do not show that it has learned "
        "anything. More epochs or a smaller eps may help."
    ]


def _chosen(facts: TrainingFacts) -> str:
    by = "clean accuracy" if facts.is_standard else f"accuracy under PGD-10 at {facts.eps}"
    return (
        f"The weights are those after epoch {facts.training['chosen']}, which had the highest "
        f"{by} on {facts.held_out} held-out images of the training split"
        f"{_left_out(facts)}. Because these images "
        "chose the weights, their figures are a little too high. No test image was looked at in "
        "training."
    )


def _left_out(facts: TrainingFacts) -> str:
    """Which epochs were no candidates, however high their accuracy."""
    *before, last = facts.training["curves"]
    reasons = []
    if facts.chosen["learned"] and not all(each["learned"] for each in (*before, last)):
        reasons.append("whose clean accuracy could not be told from chance")
    if facts.training.get("stopped") and before:
        reasons.append("at whose end the training was stopped")
    return f", leaving out epochs {' or '.join(reasons)}" if reasons else ""


def _tripped(facts: TrainingFacts) -> list[str]:
    """What the checks against false security found on the test images."""
    assert facts.attack is not None
    words = {"tripped": "tripped", "not looked at": "could not be made"}
    return [
        f"A check against false security {words[flag['state']]}, {flag['name']}: {flag['message']}"
        for flag in facts.attack["report"]["checks"]
        if flag["state"] in words
    ]
