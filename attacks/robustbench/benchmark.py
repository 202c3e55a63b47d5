"""``robustbench_evaluate``: RobustBench's ``benchmark`` (Croce et al., arXiv 2010.09670) under the
same arguments, on data that lie on disk or are given."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironmoe.attacks.autoattack import AutoAttack
from ironmoe.attacks.data.stream import ImageStream
from ironmoe.attacks.device import device_of
from ironmoe.attacks.engine.attacked_model import Model
from ironmoe.attacks.evaluation.source import Batches
from ironmoe.attacks.extra import cut
from ironmoe.attacks.robustbench.cifar import CIFAR, cifar_test_set
from ironmoe.attacks.robustbench.imagenet import (
    COUNT,
    PREPARATIONS,
    Prepared,
    imagenet_images,
)
from ironmoe.attacks.robustbench.model_info import check_model_info, write_model_info
from ironmoe.attacks.robustbench.zoo import zoo_preprocessing
from ironmoe.attacks.standard.evaluation import NAME, standard_report
from ironmoe.attacks.user_warning import warn_user

DATASETS = (*CIFAR, "imagenet")
LEADERBOARD_EPS = {
    ("cifar10", "Linf"): "8/255",
    ("cifar10", "L2"): "0.5",
    ("cifar100", "Linf"): "8/255",
    ("imagenet", "Linf"): "4/255",
}
THREAT_MODELS = ("Linf", "L2")
USUAL_COUNT = 10_000


def robustbench_evaluate(
    model: Model,
    n_examples: int = USUAL_COUNT,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: Path | str = "./data",
    corruptions_data_dir: str | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: Path | str | None = None,
    preprocessing: str | Callable[[Any], Tensor] | None = None,
    aa_state_path: Path | str | None = None,
    *,
    data: Batches | None = None,
    verbose: bool = False,
) -> tuple[float, float]:
    """Clean and robust accuracy by the standard AutoAttack, as RobustBench measures them.

    The numbers are those of ``AutoAttack.run_standard_evaluation`` on the same images. RobustBench
    leaves a model in training mode as it is, with a warning; here it is in eval mode while it is
    attacked. Nothing is downloaded.

    Args:
        model: takes images (B, 3, H, W) in [0, 1]; a module or any callable.
        n_examples: the first so many images, fewer where there are fewer; at most 5,000 of
            ImageNet.
        dataset: "cifar10", "cifar100" or "imagenet": which test set, unless ``data`` is given.
        threat_model: the norm, "Linf" or "L2". Common corruptions are refused.
        to_disk: write ``model_info/DATASET/THREAT_MODEL/MODEL_NAME.json``, as RobustBench does.
        model_name: what the model is called there. For a model of RobustBench's zoo it also says
            the ``preprocessing``, where robustbench is installed.
        data_dir: the folder with ``cifar-10-batches-py`` or ``cifar-100-python``, the files of
            torchvision; or with the validation images of ImageNet, of which RobustBench's 5,000
            are read as RobustBench does: not turned as EXIF says.
        corruptions_data_dir: must be None.
        device: the module is moved there while it is attacked; None: it stays where it is.
        batch_size: images in the active batch.
        eps: the radius; it must be given.
        log_path: a file that gets the lines of AutoAttack.
        preprocessing: for ImageNet, one of RobustBench's names, or a function from a Pillow image
            to a tensor (3, H, W) in [0, 1], or of uint8; None: that of ``model_name``. None
            elsewhere.
        aa_state_path: a folder for the journal, by which an interrupted call goes on.
        data: (images, labels), or batches of them, instead of what is on disk; they are taken as
            they are.
        verbose: print the lines of AutoAttack.

    Returns:
        (clean accuracy, robust accuracy), from 0 to 1; of a random model, expected accuracies.

    Raises:
        ValueError: an argument outside the above, or a file about the model, for ``to_disk``, that
            cannot be added to.
        FileNotFoundError: the data are not there; the message says what to download, and whereto.
    """
    dataset, threat_model = (getattr(name, "value", name) for name in (dataset, threat_model))
    _check_names(dataset, threat_model, corruptions_data_dir)
    if eps is None:
        usual = LEADERBOARD_EPS.get((dataset, threat_model))
        advice = "" if usual is None else f"; the leaderboard of {dataset} has eps={usual}"
        raise ValueError(f"eps must be given for threat_model={threat_model!r}, got None{advice}")
    if isinstance(eps, Real):
        eps = float(eps)  # one of numpy's, too, which JSON cannot hold
    if to_disk:
        check_model_info(dataset, threat_model, model_name)
    _check_count(dataset, n_examples, on_disk=data is None)
    if data is None and dataset == "imagenet" and preprocessing is None and model_name is not None:
        preprocessing = zoo_preprocessing(threat_model, model_name)
    _check_preprocessing(dataset, preprocessing, on_disk=data is None)
    if data is None:
        data = _on_disk(dataset, data_dir, n_examples, preprocessing)

    with _moved(model, device):
        adversary = AutoAttack(
            model, threat_model, eps, device=device, verbose=verbose, log_path=log_path
        )
        report = standard_report(
            adversary,
            first_images(data, n_examples),
            bs=batch_size,
            log=adversary.log(batch_size),
            state_path=aa_state_path,
        )
    if report.clean_accuracy.total < n_examples != USUAL_COUNT:
        warn_user(
            f"n_examples={n_examples}, but accuracies are of {report.clean_accuracy.total} images: "
            "there are no more",
        )
    clean = report.clean_accuracy.value
    robust = report.attacks[NAME].robust_accuracy.value

    if to_disk:
        assert model_name is not None
        write_model_info(
            dataset=dataset,
            threat_model=threat_model,
            model_name=model_name,
            eps=eps,
            clean=clean,
            robust=robust,
        )
    return clean, robust


def first_images(data: Batches, count: int) -> Batches:
    """The first so many images of (images, labels), of (images, labels, extra), or of batches of
    them; all, where there are no more."""
    if isinstance(data, ImageStream):
        return data.part(torch.arange(min(count, len(data))))
    if isinstance(data, Iterable) and not isinstance(data, tuple | Tensor):
        return _first_of_batches(data, count)
    return _first_of_batch(data, count)


def _first_of_batch(batch: Any, count: int) -> Any:
    """A batch, or its beginning."""
    size = _size(batch)
    if size <= count:
        return batch
    images, labels, *extra = batch
    return (images[:count], labels[:count], *(cut(each, size, slice(count)) for each in extra))


def _first_of_batches(batches: Iterable[Any], count: int) -> Iterator[Any]:
    left = count
    for batch in batches:
        yield _first_of_batch(batch, left)
        left -= _size(batch)
        if left <= 0:
            return


def _size(batch: Any) -> int:
    """How many images a batch has; 0 for what is none, which ``evaluate`` names."""
    is_batch = isinstance(batch, tuple | list) and len(batch) in (2, 3)
    return len(batch[1]) if is_batch and isinstance(batch[1], Tensor) else 0


def _check_names(dataset: str, threat_model: str, corruptions_data_dir: str | None) -> None:
    """ValueError: a data set or a threat model that is not evaluated here."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {DATASETS}, got {dataset!r}")
    if threat_model in ("corruptions", "corruptions_3d") or corruptions_data_dir is not None:
        got = (
            f"threat_model={threat_model!r}"
            if corruptions_data_dir is None
            else f"corruptions_data_dir={corruptions_data_dir!r}"
        )
        raise ValueError(
            f"threat_model must be one of {THREAT_MODELS}, without corruptions_data_dir, got "
            f"{got}: common corruptions are images on disk and no attack, so the accuracy on them "
            "needs no more than a loop over their files"
        )
    if threat_model not in THREAT_MODELS:
        raise ValueError(
            f"threat_model must be one of {THREAT_MODELS}, as in RobustBench, got "
            f"{threat_model!r}; AutoAttack itself takes other norms"
        )


def _check_count(dataset: str, n_examples: int, *, on_disk: bool) -> None:
    """ValueError: no image, or more than RobustBench's list has."""
    if n_examples < 1:
        raise ValueError(f"n_examples must be at least 1, got {n_examples}")
    if on_disk and dataset == "imagenet" and n_examples > COUNT:
        raise ValueError(f"n_examples must be at most {COUNT} for imagenet, got {n_examples}")


def _check_preprocessing(dataset: str, preprocessing: Any, *, on_disk: bool) -> None:
    """ValueError: a preparation that is not done here, or none for pictures."""
    reads_pictures = on_disk and dataset == "imagenet"
    if preprocessing is not None and not reads_pictures:
        raise ValueError(
            f"preprocessing must be None for {dataset if on_disk else 'data='}, whose images are "
            f"taken as they are, got {preprocessing!r}: prepare them, and give data="
        )
    if reads_pictures and preprocessing not in PREPARATIONS and not callable(preprocessing):
        raise ValueError(
            f"preprocessing must be one of {tuple(PREPARATIONS)} for imagenet, or a function from "
            f"a Pillow image to a tensor, got {preprocessing!r}; for a model of RobustBench's zoo "
            "model_name is enough, where robustbench is installed"
        )


def _on_disk(
    dataset: str,
    data_dir: Path | str,
    n_examples: int,
    preprocessing: str | Callable[[Any], Tensor] | None,
) -> Batches:
    """The test set of a data set, from the files that torchvision reads, too; ImageNet as a
    stream."""
    if dataset == "imagenet":
        assert preprocessing is not None
        named = PREPARATIONS[preprocessing] if isinstance(preprocessing, str) else None
        pipeline = named or Prepared(preprocessing)  # type: ignore[arg-type]
        return ImageStream(imagenet_images(data_dir, n_examples), pipeline)
    return cifar_test_set(dataset, data_dir, n_examples)


@contextmanager
def _moved(model: Any, device: torch.device | str | None) -> Iterator[None]:
    """A module on this device, and back where it was at the end."""
    before = device_of(model)
    if device is None or before is None:
        yield
        return
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
