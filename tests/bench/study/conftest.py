"""What the tests of a whole study start from."""

import numpy as np
import pytest

from ironmoe.bench.data.in_memory import ImageData, load_data
from ironmoe.bench.study import run


@pytest.fixture(scope="module")
def no_figures():
    """They take seconds, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FIGURES", ())
        yield


@pytest.fixture(scope="session")
def few():
    """75 images of three digits."""
    digits = load_data("digits")
    rows = np.concatenate([np.flatnonzero(digits.labels == label)[:25] for label in range(3)])
    return ImageData("few", digits.images[rows], digits.labels[rows], list("012"), [])
