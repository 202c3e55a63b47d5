"""PGD on images that stream: what of the time the model takes, and what waiting takes."""

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.data import ImageStream
from ironmoe.attacks.data.files import ImageFiles
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.bench.benchmarks.images.memory import Row
from ironmoe.bench.common.files import write_json
from ironmoe.bench.common.radii import from_255
from ironmoe.bench.models.load import load_model

CLASSES = 1000
MODELS = ("robust", "plain")
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
    "image_size": 224,
    "patch_size": 16,
}
"""Those of ViT-S/16."""

TIMM = "vit_small_patch16_224"


def make_model(kind: str, source: str, folder: Path) -> str:
    """What ``--model`` says of a ViT of ViT-S size over 1,000 classes, with random weights, which
    is made in the folder if it is not there.

    "plain" falls to the first steps of an attack. "robust" has a head that is nearly constant, so
    that no attack finds anything and each runs to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return SOURCES[source](kind, folder)


def _hugging_face(kind: str, folder: Path) -> str:
    from transformers import ViTConfig, ViTForImageClassification

    path = folder / f"vit-s-{kind}"
    if not (path / "preprocessor_config.json").exists():
        torch.manual_seed(0)
        config = ViTConfig(**SIZES)
        config.num_labels = CLASSES
        model = ViTForImageClassification(config)
        _make(kind, model.classifier)
        model.save_pretrained(path)
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "size": {"height": 224, "width": 224},
            "resample": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        }
        write_json(path / "preprocessor_config.json", settings)
    return f"hf:{path}"


def _timm(kind: str, folder: Path) -> str:
    import timm
    from safetensors.torch import save_file

    path = folder / f"timm-{kind}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        model = timm.create_model(TIMM, num_classes=CLASSES)
        _make(kind, model.head)
        save_file(model.state_dict(), path)
    return f"timm:{TIMM}?checkpoint={path}&num_classes={CLASSES}"


SOURCES: dict[str, Callable[[str, Path], str]] = {"hf": _hugging_face, "timm": _timm}


def why_not(source: str) -> str:
    """Why models of this library cannot be made here; empty if they can."""
    try:
        importlib.import_module({"hf": "transformers", "timm": "timm"}[source])
    except Exception as error:  # a torchvision of another torch raises RuntimeError, for one
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def _make(kind: str, head: nn.Module) -> None:
    """Leave a head as it is, or make it nearly constant."""
    assert isinstance(head, nn.Linear)
    if kind == "robust":
        head.weight.mul_(1e-3)
        head.bias.copy_(torch.randn(CLASSES, generator=torch.Generator().manual_seed(1)))


def attacked(
    source: str,
    model: str,
    files: list[str],
    workers: int,
    batch_size: int,
    dtype: str,
    folder: str,
) -> Row:
    """PGD-10 at 4/255 on the images, each with the class that the model gives it as its label.

    Returns:
        seconds; model_share: of them spent in passes of the model, forward and backward;
        waited_share: spent waiting for images once the first had come; images_per_second;
        robust_accuracy in percent.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(None, make_model(model, source, Path(folder)), device)
    assert loaded.pipeline is not None
    labels = _labels(loaded.model, loaded.pipeline, files, workers, device)

    stream = _stream(files, labels, loaded.pipeline, workers)
    attack_dtype = torch.bfloat16 if dtype == "bfloat16" else None
    attack = PGD(loaded.model, from_255(4), steps=10, attack_dtype=attack_dtype)
    spent = _timed(attack.attacked_model, device)
    began = time.perf_counter()
    report = evaluate(loaded.model, stream, {"pgd": attack}, batch_size=batch_size, checks=False)
    seconds = time.perf_counter() - began
    return {
        "source": source,
        "model": model,
        "images": len(files),
        "workers": workers,
        "batch_size": batch_size,
        "dtype": dtype,
        "seconds": seconds,
        "images_per_second": len(files) / seconds,
        "model_share": spent[0] / seconds,
        "waited_share": stream.waited / seconds,
        "robust_accuracy": 100 * report.attacks["pgd"].robust_accuracy.value,
    }


def _stream(files: list[str], labels: list[int], pipeline: Any, workers: int) -> ImageStream:
    names = [Path(file).name for file in files]
    images = ImageFiles("jpegs", Path(files[0]).parent, names, labels, None)
    return ImageStream(images, pipeline, workers=workers)


@torch.no_grad()
def _labels(
    model: nn.Module, pipeline: Any, files: list[str], workers: int, device: torch.device
) -> list[int]:
    """The classes that the model gives the images."""
    found: list[int] = []
    for pixels, _ in _stream(files, [0] * len(files), pipeline, workers):
        found += model(pixels.to(device)).argmax(1).tolist()
    return found


def _timed(model: AttackedModel, device: torch.device) -> list[float]:
    """A list whose entry grows by the seconds of each pass of the model."""
    spent = [0.0]
    for name in ("ask", "judge"):
        plain = getattr(model, name)

        def timed(*args: Any, plain: Any = plain, **options: Any) -> Tensor:
            began = time.perf_counter()
            answer = plain(*args, **options)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent[0] += time.perf_counter() - began
            return answer

        setattr(model, name, timed)
    return spent
