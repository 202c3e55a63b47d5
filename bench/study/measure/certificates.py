"""What is proved of the smoothed models, if it is asked for."""

from ironmoe.attacks.certificates import certify
from ironmoe.bench.common.radii import exact
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement
from ironmoe.bench.study.measure.subject import Subject

RADII = (0.0, 0.25, 0.5)  # in L2, in units of the pixel range
SELECTION = 100  # copies that choose the class


@measurement(
    "certificates",
    "certified accuracy of the smoothed model in L2 (randomised smoothing); it says nothing of the "
    "model itself, and the models here are not trained with noise",
    settings=("certified_images", "samples", "sigma", "seed"),
    passes=lambda budget: 0.4 * budget.certified_images * (budget.samples + SELECTION),
    is_optional=True,
)
def certificates(subject: Subject, budget: Budget) -> Outcome:
    """Shares "certified@radius", with radii in units of the pixel range, and "certified:abstained";
    "certified radius", the mean, 0 of an image that is wrong or has none; of each image its
    radius."""
    report = certify(
        subject.model,
        subject.sample(budget.certified_images),
        sigma=budget.sigma,
        selection=SELECTION,
        samples=budget.samples,
        batch_size=budget.batch_size,
        seed=budget.seed,
    )
    values = {
        f"certified@{exact(radius)}": report.certified_accuracy_at(radius).value for radius in RADII
    }
    radii = [row.radius if row.right else 0.0 for row in report.certificates]
    values["certified:abstained"] = report.abstentions.value
    values["certified radius"] = sum(radii) / len(radii)
    return Outcome(values, {"certified radius": radii})
