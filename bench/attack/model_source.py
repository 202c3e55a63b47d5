"""Models to attack from anywhere: a checkpoint of this library, Hugging Face, the official V-MoE
code, or a Python function.

All come out as modules from images in [0, 1] to logits, in eval mode.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from ironmoe.bench.common.checkpoints import load_checkpoint, load_weights
from ironmoe.bench.common.errors import told
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.moe import Capacity, CheckpointError, VMoE, read_npz_checkpoint, read_vmoe_checkpoint

FORMS = "hf:FOLDER, vmoe:PREFIX or package.module:function"


class LoadedModel(NamedTuple):
    """A model that can be attacked, and what is known of it.

    model: from images (B, C, S, S) in [0, 1] to logits; classes: their names, by index of the
    logits, None if they are not known; facts: what report and settings say of it.

    source: how the command named it; identity: the part of the name that makes it another model.
    """

    model: nn.Module
    name: str
    image_shape: tuple[int, ...] | None
    classes: list[str] | None
    facts: dict[str, Any]
    source: str = ""
    identity: str = ""


class Normalized(nn.Module):
    """A model that wants normalized images, as one that takes images in [0, 1].

    It computes (images − mean) / std before the model. From the output of a Hugging Face model it
    takes the logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        output = self.model((images - self.mean) / self.std)
        return output.logits if hasattr(output, "logits") else output


def load_model(
    checkpoint: Path | None,
    spec: str | None,
    data: ImageData,
    device: torch.device,
    *,
    weights: Path | None = None,
) -> LoadedModel:
    """The model that a command names, on ``device`` and in eval mode.

    Args:
        checkpoint: a file that the demo wrote, or None.
        spec: one of FORMS, or None.
        data: the images that it will be asked about.
        weights: a safetensors file whose tensors replace those of the model of ``spec``, or None.

    Raises:
        CheckpointError: there is not exactly one name, or the model cannot be loaded.
    """
    if weights is not None and spec is None:
        got = "no model" if checkpoint is None else f"{checkpoint}, which has its own weights"
        raise CheckpointError(f"--weights {weights} must come with --model, got {got}")
    if (checkpoint is None) == (spec is None):
        both = (
            ""
            if spec is None
            else f", not both: got the checkpoint {checkpoint} and --model {spec}"
        )
        raise CheckpointError(
            f"name one model: a .safetensors CHECKPOINT, or --model {FORMS}{both}"
        )

    if checkpoint is not None:
        # the digest of the weights tells the model, so the file may move to another folder
        return _own(checkpoint, device)._replace(
            source=f"checkpoint {checkpoint}", identity=checkpoint.name
        )

    assert spec is not None
    kind, _, rest = spec.partition(":")
    if not rest:
        raise CheckpointError(f"--model must be {FORMS}, got {spec!r}")

    size = int(data.images.shape[-1])
    loaded = (
        _hugging_face(rest)
        if kind == "hf"
        else _official(rest, size)
        if kind == "vmoe"
        else _factory(kind, rest)
    )

    if weights is not None:
        load_weights(loaded.model, weights)
    identity = f"{kind}:{os.path.abspath(rest)}" if kind in ("hf", "vmoe") else spec
    return loaded._replace(
        model=loaded.model.to(device).eval(), source=f"--model {spec}", identity=identity
    )


def _own(path: Path, device: torch.device) -> LoadedModel:
    model, extra = load_checkpoint(path, device)
    facts = {
        "seed": extra["seed"],
        "train_seconds": extra["seconds"],
        "trained_on": extra["checksum"],
        "stem": path.stem,
        "trained_on_data": extra["data"],
    }
    shape = (model.channels, model.image_size, model.image_size)
    return LoadedModel(model, extra["name"], shape, extra["classes"], facts)


def _hugging_face(path: str) -> LoadedModel:
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise CheckpointError(
            f"--model hf:{path} needs the transformers package: {error}"
        ) from error

    try:
        model = AutoModelForImageClassification.from_pretrained(path, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"--model hf:{path} is no image classifier that transformers can read here: "
            f"{told(error)}"
        ) from error

    config = Path(path) / "preprocessor_config.json"
    try:
        settings = json.loads(config.read_text()) if config.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{config} must be JSON: {error}") from error

    channels = getattr(model.config, "num_channels", 3)
    normalizes = settings.get("do_normalize", "image_mean" in settings)
    mean, std = (
        settings[key] if normalizes and key in settings else [default] * channels
        for key, default in (("image_mean", 0.0), ("image_std", 1.0))
    )
    classes = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    facts = {"seed": 0, "train_seconds": None, "stem": Path(path).name, "mean": mean, "std": std}
    return LoadedModel(Normalized(model, mean, std), type(model).__name__, None, classes, facts)


def _official(spec: str, size: int) -> LoadedModel:
    """A model of the official V-MoE code.

    spec: PREFIX or PREFIX?top_k=2&capacity=1.05&images_per_group=8&priority=1&dispatch=bfloat16.
    """
    prefix, _, query = spec.partition("?")
    known = {
        "top_k": int,
        "capacity": float,
        "images_per_group": int,
        "priority": int,
        "dispatch": str,
    }
    given: dict[str, Any] = {}

    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            given[key] = known[key](value)
        except (KeyError, ValueError):
            raise CheckpointError(
                f"--model vmoe:{spec} may set {', '.join(known)}, got {key}={value!r}"
            ) from None

    if given.get("dispatch", "bfloat16") != "bfloat16":
        raise CheckpointError(
            f"--model vmoe:{spec} may set dispatch=bfloat16 only, got {given['dispatch']!r}"
        )
    try:
        params = (
            read_npz_checkpoint(prefix) if prefix.endswith(".npz") else read_vmoe_checkpoint(prefix)
        )
        model = VMoE.from_jax(
            params,
            image_size=size,
            top_k=given.get("top_k"),
            capacity=_capacity(given),
            dispatch_dtype=torch.bfloat16 if "dispatch" in given else None,
        )
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"--model vmoe:{spec}: {error}") from error

    facts = {"seed": 0, "train_seconds": None, "stem": Path(prefix).stem}
    half = [0.5] * model.channels  # the official code's pixels lie in [−1, 1]
    shape = (model.channels, size, size)
    name = "V-MoE" if model.first_moe < len(model.blocks) else "ViT"
    return LoadedModel(
        Normalized(model, half, half), f"{name} {Path(prefix).stem}", shape, None, facts
    )


def _capacity(given: dict[str, Any]) -> Capacity | None:
    """The limit of each expert's rows that the query asks for; None without one."""
    factor, group = given.get("capacity"), given.get("images_per_group")
    if factor is None:
        return None
    return Capacity(factor, images_per_group=group, priority=bool(given.get("priority")))


def _factory(module: str, function: str) -> LoadedModel:
    spec = f"{module}:{function}"
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"--model {spec} cannot be found: {error}; it must be {FORMS}"
        ) from error
    except Exception as error:
        raise CheckpointError(f"--model {spec} cannot be imported: {told(error)}") from error
    finally:
        sys.path.pop(0)

    try:
        model = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise CheckpointError(
            f"--model {spec} must be a torch.nn.Module or a function without arguments, and "
            f"calling it failed: {told(error)}"
        ) from error

    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"--model {spec} must be, or return, a torch.nn.Module from images in [0, 1] to "
            f"logits, got {type(model).__name__}"
        )

    return LoadedModel(
        model,
        function,
        None,
        None,
        {"seed": 0, "train_seconds": None, "stem": spec.replace(":", "-")},
    )
