"""The model that is trained: a new one by name, a checkpoint, or a model from elsewhere; and how
its weights are saved."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ironmoe.attacks.data import DataError
from ironmoe.attacks.data.reading import Pipeline
from ironmoe.attacks.evaluation.checksum import model_digest
from ironmoe.bench.common.checkpoints import (
    architecture,
    arguments_of,
    save_weights,
    save_weights_alone,
)
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.models.class_matching import match_data
from ironmoe.bench.models.load import FORMS, load_model
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.registry import file_kind
from ironmoe.moe import CheckpointError, VMoE
from ironmoe.moe.vit.configs import from_config

OWN = {"v-moe": "V-MoE", "vit": "ViT"}  # the demo's two models, which suit small images
OF_PAPERS = re.compile(r"(ViT|V-MoE)-")
ALL_FORMS = f"{', '.join(OWN)}, a paper's name such as V-MoE-S/16, a .safetensors file, {FORMS}"


class Trainee(NamedTuple):
    """A model to train, and what is known of it.

    name: for people; spec: as the command names it; labels (N,): those of the data, as indices of
    the logits; classes: names by index of the logits; note: how classes were matched to logits, if
    not by name.

    arguments: of ``VMoE``, for a checkpoint that says how to build the model; None for a model from
    elsewhere; identity: what makes it another model.
    """

    model: nn.Module
    name: str
    spec: str
    labels: Tensor
    classes: list[str]
    arguments: dict[str, Any] | None
    identity: dict[str, Any]
    note: str = ""

    def saved(self, weights: dict[str, Tensor], extra: dict[str, Any]) -> bytes:
        """The content of the safetensors file: a checkpoint, or the tensors of a model from
        elsewhere, which ``ironmoe attack --model … --weights FILE`` loads."""
        if self.arguments is not None:
            return save_weights(weights, self.arguments, extra)
        return save_weights_alone(weights)


def pipeline_of(spec: str) -> Pipeline | None:
    """How the model that ``--model`` names wants its pictures; None for new models and checkpoints
    of ironmoe's own.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    is_own = spec in OWN or OF_PAPERS.match(spec) or Path(spec).suffix.lower() == ".safetensors"
    if is_own or ":" not in spec:
        return None
    return load_model(None, spec, torch.device("cpu")).pipeline


def load_trainee(spec: str, data: ImageData, seed: int, device: torch.device) -> Trainee:
    """The model that ``--model`` names, on ``device``. New weights are drawn from the seed.

    Raises:
        CheckpointError: it cannot be loaded.
        UserError: there is no such model, or it does not suit the images or the classes.
    """
    torch.manual_seed(seed)
    arguments = _arguments(spec, data)
    if arguments is None:
        return _loaded(spec, data, device)

    name = OWN.get(spec, spec)
    try:
        model = VMoE(**arguments).to(device)
    except ValueError as error:
        raise UserError(f"--model {spec} does not suit these images: {error}") from error
    return Trainee(model, name, spec, data.labels, data.classes, arguments, {"model": spec})


def _arguments(spec: str, data: ImageData) -> dict[str, Any] | None:
    """The arguments of ``VMoE`` for a new model; None if ``spec`` names a model with weights."""
    shape = tuple(data.images.shape[1:])
    if spec in OWN:
        return architecture(OWN[spec], shape, len(data.classes))
    if not OF_PAPERS.match(spec):
        return None
    try:
        made: dict[str, Any] = from_config(
            dict,
            spec,
            image_size=shape[-1],
            channels=shape[0],
            num_classes=len(data.classes),
        )
    except ValueError as error:
        raise UserError(f"--model {spec}: {error}") from error
    return made


def _loaded(spec: str, data: ImageData, device: torch.device) -> Trainee:
    """A model that has weights already."""
    path = Path(spec)
    is_file = path.suffix.lower() == ".safetensors"
    if not is_file and ":" not in spec and file_kind(path) is None:
        raise CheckpointError(f"--model must be {ALL_FORMS}, got {spec!r}")

    loaded = load_model(
        path if is_file else None,
        None if is_file else spec,
        device,
        image_size=data.size,
    )
    if is_file and loaded.classes != data.classes:
        raise DataError(
            f"data {data.name!r} must have the classes of {path}, {loaded.classes}, got "
            f"{data.classes}"
        )
    matched, note = match_data(loaded, data)
    return Trainee(
        model=loaded.model,
        name=loaded.name,
        spec=spec,
        labels=matched.labels,
        classes=matched.classes,
        arguments=arguments_of(path) if is_file else None,
        identity=_identity(loaded),
        note=note,
    )


def _identity(loaded: LoadedModel) -> dict[str, Any]:
    return {"model": loaded.identity, "weights": model_digest(loaded.model)}
