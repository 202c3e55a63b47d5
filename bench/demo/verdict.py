"""What the numbers of the demo show and what they cannot show, in words."""

from statistics import mean

from ironmoe.bench.common.radii import exact
from ironmoe.bench.reports.model_results import ModelResults


def verdict(models: list[ModelResults]) -> list[str]:
    """A paragraph for each thing that there is to say."""
    seeds = len(models[0].runs)
    lines = []
    if len(models) == 2:
        lines.append(_comparison(models[0], models[1]))

    if seeds == 1:
        lines.append(
            "This is one seed. The intervals are 95 % Wilson intervals: how precisely the test "
            "images measure these very weights. They say nothing of another training run, which "
            "can move robust accuracy by more than the interval is wide. One seed can show that "
            "an attack works, how far routing moves, and what a model costs; it cannot show that "
            "one architecture is more robust than another. Use --seeds 5 for that."
        )
    else:
        counts = (
            "Two seeds show that results vary, not by how much."
            if seeds == 2
            else "A difference counts where it has the same sign in every seed and exceeds the "
            "spread."
        )
        lines.append(
            f"Mean ± standard deviation over {seeds} seeds, each a training of its own, smallest "
            f"and largest in brackets; every seed sees the same data split. {counts}"
        )

    lines.append(
        "Robust accuracy is an upper bound: it is what this attack left standing. A stronger "
        "attack, more steps or more restarts can only lower it."
    )
    return lines


def _comparison(a: ModelResults, b: ModelResults) -> str:
    parts = []
    for i, eps in enumerate(a.eps):
        x, y = a.robust(i), b.robust(i)
        differences = [100 * (p - q) for p, q in zip(x.values, y.values, strict=True)]
        if len(differences) == 1:
            apart = x.interval[0] > y.interval[1] or y.interval[0] > x.interval[1]
            note = "intervals apart" if apart else "intervals overlap"
        else:
            higher = sum(d > 0 for d in differences)
            note = f"{a.name} higher in {higher} of {len(differences)} seeds"
        parts.append(
            f"{round(mean(differences), 1) + 0.0:+.1f} points at eps {exact(eps)}/255 ({note})"
        )

    return f"Robust accuracy of {a.name} minus {b.name}: " + ", ".join(parts) + "."
