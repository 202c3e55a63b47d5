"""The error about images for which a model gives nothing finite."""

from collections.abc import Sequence

from ironmoe.attacks.engine.job import Job

SHOWN = 10


def not_finite(
    numbers: Sequence[int], total: int | None, during: str, must: str = "return finite logits"
) -> ValueError:
    """It names the images by their ``numbers`` in the data.

    total: of how many, if that is known; during: what the model was asked for; must: what it had to
    do.
    """
    of_all = "" if total is None else f" of {total}"
    named = ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")
    return ValueError(
        f"model must {must}, got NaN for {len(numbers)}{of_all} examples {during}, in the data "
        f"number {named}; evaluate leaves such examples out with on_bad='skip', a command with "
        "--on-bad skip"
    )


def not_finite_under(units: Sequence[tuple[Job, Sequence[bool]]]) -> ValueError:
    """The same about images under attack: of each unit, which of its images are bad."""
    numbers = dict.fromkeys(
        example.number
        for job, bad in units
        for example, is_bad in zip(job.examples, bad, strict=True)
        if is_bad
    )
    must = "return finite logits and have finite input gradients"
    return not_finite(list(numbers), None, f"under {units[0][0].attack.name}", must)
