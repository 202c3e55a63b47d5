"""The error about images for which a model gives nothing finite."""

from collections.abc import Sequence

SHOWN = 10


def not_finite(numbers: Sequence[int], total: int, during: str) -> ValueError:
    """It names the images by their ``numbers`` in the data.

    total: of how many; during: what the model was asked for.
    """
    named = ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")
    return ValueError(
        f"model must return finite logits and have finite input gradients, got NaN for "
        f"{len(numbers)} of {total} examples {during}, in the data number {named}; evaluate leaves "
        "such examples out with on_bad='skip'"
    )
