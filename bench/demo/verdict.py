"""What the numbers of the demo show and what they cannot show, in words."""

from ironmoe.bench.common.radii import exact
from ironmoe.bench.demo.comparison import AT_CHANCE, DOUBTFUL, HELD, compare, state
from ironmoe.bench.reports.cells import counted
from ironmoe.bench.reports.model_results import ModelResults

ONE_SEED = (
    "This is one seed. The intervals are 95 % Wilson intervals: how precisely the test images "
    "measure these very weights. They say nothing of another training run, which can move robust "
    "accuracy by more than the interval is wide. One seed can show that an attack works, how far "
    "routing moves, and what a model costs; it cannot show that one architecture is more robust "
    "than another. Use --seeds 5 for that."
)
UPPER_BOUND = (
    "Robust accuracy is an upper bound: it is what this attack left standing. A stronger attack, "
    "more steps or more restarts can only lower it."
)


def verdict(models: list[ModelResults]) -> list[str]:
    """A paragraph for each thing that there is to say. The first one is the verdict."""
    lines = [f"Verdict: {headline(models)}"]
    lines += [_at_chance(model) for model in models if state(model) == AT_CHANCE]
    lines += [line for model in models for line in _tripped(model)]
    lines += [
        f"No image of the {model.name} fell, so there is no adversarial image of it to show."
        for model in models
        if not model.anything_fell
    ]

    seeds = len(models[0].runs)
    return [*lines, ONE_SEED if seeds == 1 else _several_seeds(seeds), UPPER_BOUND]


def headline(models: list[ModelResults]) -> str:
    """The verdict in one or two sentences."""
    states = {model.name: state(model) for model in models}
    if lost := [name for name, found in states.items() if found == AT_CHANCE]:
        return (
            f"none, because the {' and the '.join(lost)} cannot be told from chance on clean "
            "images. What is left under attack says nothing of robustness."
        )

    doubts = ""
    if doubtful := [name for name, found in states.items() if found == DOUBTFUL]:
        doubts = (
            f" Checks against false security tripped for the {' and the '.join(doubtful)}: robust "
            "accuracy may be lower than it looks."
        )
    held = [name for name, found in states.items() if found == HELD]
    seeds = len(models[0].runs)
    if len(held) == len(models):
        return f"nothing fell, up to eps {exact(models[0].eps[-1])}/255.{doubts}"
    if seeds == 1:
        return (
            "the attack works, and one seed leaves open whether one architecture is more robust "
            f"than the other.{doubts}"
        )
    return f"{_decided(models)}{doubts}"


def _decided(models: list[ModelResults]) -> str:
    first, second = models
    found = compare(first, second)
    higher = [exact(at.eps_255) for at in found if at.decided and at.mean > 0]
    lower = [exact(at.eps_255) for at in found if at.decided and at.mean < 0]
    seeds = counted(len(first.runs), "seed")
    if not higher and not lower:
        return f"{seeds} show no difference between the {first.name} and the {second.name}."

    parts = [
        f"the {name} is more robust at eps {', '.join(radii)} (in 1/255)"
        for name, radii in ((first.name, higher), (second.name, lower))
        if radii
    ]
    return (
        f"in {seeds} {'; '.join(parts)}: there the 95 % interval of the paired difference lies on "
        "one side of 0. It is a look at each eps for itself."
    )


def _at_chance(model: ModelResults) -> str:
    runs = model.runs_at_chance
    of_seeds = "" if len(model.runs) == 1 else f" in seed {', '.join(str(r['seed']) for r in runs)}"
    chance, classes = runs[0]["chance"], runs[0]["classes"]
    of = f"the share of the largest of {classes} classes"
    if chance <= 1 / classes:
        of = f"that of {classes} classes"
    return (
        f"The clean accuracy of the {model.name}{of_seeds}, {model.clean()}, cannot be told from "
        f"chance, {100 * chance:.3g} %, {of}. More epochs or more images may help."
    )


def _tripped(model: ModelResults) -> list[str]:
    """What each tripped check says, once."""
    messages = {flag["name"]: flag["message"] for flag in model.checks if flag["tripped"]}
    return [
        f"A check against false security tripped for the {model.name}, {name}: {message}"
        for name, message in messages.items()
    ]


def _several_seeds(seeds: int) -> str:
    few = " Two seeds show that results vary, not by how much." if seeds == 2 else ""
    return (
        f"Mean ± standard deviation over {seeds} seeds, each a training of its own, smallest and "
        "largest in brackets; every seed sees the same data split. Differences are paired by seed, "
        "because models of one seed begin with the same weights where they have the same modules, "
        f"and see the same batches; in brackets is the 95 % t interval.{few}"
    )
