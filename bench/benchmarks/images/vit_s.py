"""ViTs of ViT-S size over 1,000 classes with random weights, from each library by its name."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ironmoe.bench.common.files import write_json

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
