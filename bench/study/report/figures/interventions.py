"""What other choices of experts do to accuracy, on clean images and on those of PGD."""

from functools import partial
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ironmoe.bench.reports.cells import counted
from ironmoe.bench.study.claims.parts.words import listed, number
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.report.figures.parts.captions import in_trainings, of_runs, sentences
from ironmoe.bench.study.report.figures.parts.dots import strokes
from ironmoe.bench.study.report.figures.parts.figure import StudyFigure
from ironmoe.bench.study.report.figures.parts.groups import few
from ironmoe.bench.study.report.figures.parts.looks import BLACK
from ironmoe.bench.study.report.figures.parts.panels import Panel, draw_panels
from ironmoe.bench.study.report.runs import StudyRuns

OWN = "none"
IMAGES = {"clean": "clean images", "attacked": "images after PGD"}
ROW, FRAME = 0.27, 0.8  # inches


def draw(runs: StudyRuns) -> Figure | None:
    """A line of two panels for each training."""
    return draw_panels(
        [
            [
                Panel(f"{training}: {title}", partial(_panel, runs, training, images))
                for images, title in IMAGES.items()
            ]
            for training in runs.trainings
        ],
        height=height(runs),
    )


def height(runs: StudyRuns) -> float:
    """Of a panel with a row for each intervention, in inches."""
    most = max((len(names(runs, training)) for training in runs.trainings), default=0)
    return FRAME + ROW * max(4, most)


def names(runs: StudyRuns, training: str) -> list[str]:
    """Of all interventions that were measured, apart from none."""
    return [name for name in runs.before(training, ":clean") if name != OWN]


def accuracy_changes(
    runs: StudyRuns, training: str, arm: Arm, name: str, images: str
) -> list[float]:
    """Accuracy under an intervention minus that with the router's own choice, in points, of each
    run."""
    own = runs.values(training, arm, f"{OWN}:{images}")
    steered = runs.values(training, arm, f"{name}:{images}")
    return [100 * (steered[seed] - own[seed]) for seed in steered if seed in own]


def _panel(runs: StudyRuns, training: str, images: str, axes: Axes) -> bool:
    rows = names(runs, training)
    of_arms = {
        arm: {name: accuracy_changes(runs, training, arm, name, images) for name in rows}
        for arm in few(runs.arms)
    }
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_xlabel("accuracy − accuracy of the own choice, in points")
    return strokes(axes, rows, of_arms, named=images == "clean")


def what_is_drawn(runs: StudyRuns) -> str:
    """The marks and the arms."""
    return (
        f"Thin strokes are runs ({of_runs(runs)}), marks their means, lines 95 % t intervals over "
        "runs, where there are two or more. “Same sum”: gates are scaled to the sum of the "
        "router's, so that only the identity of experts changes. Drawn: "
        f"{listed([arm.name for arm in few(runs.arms)])}; report.json has all arms."
    )


def caption(runs: StudyRuns) -> str:
    """What is drawn, and the lowest mean of each arm."""

    def falls(training: str) -> str:
        texts = []
        for arm in few(runs.arms):
            changes = {
                name: accuracy_changes(runs, training, arm, name, "clean")
                for name in names(runs, training)
            }
            found = {name: fmean(values) for name, values in changes.items() if values}
            if found:
                worst = min(found, key=found.__getitem__)
                texts.append(f"{arm.name} {number(found[worst])} ({worst})")
        return f"lowest means on clean images, in points: {', '.join(texts)}" if texts else ""

    clean, attacked = (runs.images_asked(name) for name in ("clean_images", "routed_images"))
    return sentences(
        "Accuracy with other experts or gates minus that with the router's own, on "
        f"{counted(clean, 'clean image')} and on {attacked} after PGD at the "
        "one radius of the training. PGD was made against the own choice, so any change may help "
        "there.",
        what_is_drawn(runs),
        in_trainings(runs, falls),
    )


INTERVENTIONS = StudyFigure(
    name="interventions",
    title="Effect of each intervention on accuracy",
    needs=(OWN,),
    of_experts=True,
    draw=draw,
    caption=caption,
)
