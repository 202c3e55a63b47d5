"""PGD on images that stream: what of the time the model takes, and what waiting takes."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.data import ImageStream
from ironmoe.attacks.data.files import ImageFiles
from ironmoe.attacks.engine.attacked_model import AttackedModel
from ironmoe.bench.benchmarks.images.memory import Row
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


def make_model(kind: str, folder: Path) -> Path:
    """A folder with a ViT of ViT-S size over 1,000 classes, with random weights, as transformers
    saves it.

    "plain" falls to the first steps of an attack. "robust" has a head that is nearly constant, so
    that no attack finds anything and each runs to its end.
    """
    from transformers import ViTConfig, ViTForImageClassification

    path = folder / f"vit-s-{kind}"
    if (path / "preprocessor_config.json").exists():
        return path
    torch.manual_seed(0)
    config = ViTConfig(**SIZES)
    config.num_labels = CLASSES
    model = ViTForImageClassification(config)
    if kind == "robust":
        head = model.classifier
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.mul_(1e-3)
            head.bias.copy_(torch.randn(CLASSES, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(path)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def attacked(
    model: str, files: list[str], workers: int, batch_size: int, dtype: str, folder: str
) -> Row:
    """PGD-10 at 4/255 on the images, each with the class that the model gives it as its label.

    Returns:
        seconds; model_share: of them spent in passes of the model, forward and backward;
        waited_share: spent waiting for images once the first had come; images_per_second;
        robust_accuracy in percent.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(None, f"hf:{make_model(model, Path(folder))}", device)
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
