"""Models that a user hands in: ``--model NAME@SEED/TRAINING=MODEL``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from ironmoe.attacks.data.reading import Pipeline
from ironmoe.bench.common.checkpoints import count_flops
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.bench.models.class_matching import match_data
from ironmoe.bench.models.load import FORMS, load_model
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.study.ladder.arms import Arm
from ironmoe.bench.study.work.architecture import arm_of
from ironmoe.bench.study.work.entries import CPU, Entry
from ironmoe.moe.routing.routed_layers import routing_sites

TRAINING = "as handed in"
WITHIN = 0.01  # FLOPs that differ by less are equal


class HandedIn(NamedTuple):
    """What the user wrote. training: in the user's words; source: a checkpoint file, or one of
    FORMS."""

    name: str
    seed: int
    training: str
    source: str

    def __str__(self) -> str:
        end = "" if self.training == TRAINING else f"/{self.training}"
        return f"{self.name}@{self.seed}{end}"


def read_option(text: str) -> HandedIn:
    """NAME@SEED/TRAINING=MODEL; without /TRAINING it is TRAINING, without @SEED/… the seed is 0.

    Raises:
        UserError: it is not of this form.
    """
    head, equals, source = text.partition("=")
    name, at, rest = head.partition("@")
    seed, slash, training = rest.partition("/")
    complete = equals and name and source and (not at or seed.isdecimal())
    if not complete or (slash and not training):
        raise UserError(
            "--model must be NAME@SEED=MODEL or NAME@SEED/TRAINING=MODEL, where MODEL is a "
            f".safetensors file, {FORMS}, got {text!r}"
        )
    return HandedIn(name, int(seed) if at else 0, training or TRAINING, source)


def pipeline_of_all(texts: Sequence[str]) -> Pipeline | None:
    """How all models want their pictures; None if they do not say.

    Raises:
        UserError: they want them in different ways.
    """
    found: dict[str, Pipeline | None] = {}
    for text in texts:
        source = read_option(text).source
        is_file = source.lower().endswith(".safetensors")
        model = None if is_file else load_model(None, source, torch.device(CPU))
        found[source] = None if model is None else model.pipeline

    ways = {source: _pixels_of(pipeline) for source, pipeline in found.items()}
    (first, way), *others = ways.items()
    other = next((source for source, each in others if each != way), None)
    if other is not None:
        raise UserError(
            f"--model {other} must take the same pixels as {first}, since a study asks all models "
            f"about the same images, got {found[other] or 'no preprocessing'} and "
            f"{found[first] or 'no preprocessing'}"
        )
    return found[first]


def _pixels_of(pipeline: Pipeline | None) -> dict[str, Any]:
    """What a pipeline does, without mean and std, which are the model's part."""
    everything = {} if pipeline is None else pipeline.as_dict()
    return {key: value for key, value in everything.items() if key not in ("mean", "std")}


def handed_in(texts: tuple[str, ...], data: ImageData) -> tuple[list[Entry], ImageData]:
    """The entries of all models, in their order, and the data with labels as these models have
    them, and with notes of what was guessed.

    Arms are named by the user. E, K and gates are read from a model, and FLOPs are counted: models
    of other FLOPs than the first dense one, or without one than the first of all, take no part in
    what is said about equal cost.

    Raises:
        UserError: two models have one name, seed and training, models of one name differ in what
            an arm is or in size, models have their classes in other orders, or a model does not
            give a finite logit for each class.
        CheckpointError: a model cannot be loaded.
    """
    given = [read_option(text) for text in texts]
    names = [str(each) for each in given]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--model must name each NAME@SEED/TRAINING once, got {twice[0]} twice")

    loaded = [_load(each.source, data) for each in given]
    models = [each.model for each in loaded]
    matched = [match_data(each, data) for each in loaded]
    labels = [found.labels for found, _ in matched]
    other = next((i for i, row in enumerate(labels) if not torch.equal(row, labels[0])), None)
    if other is not None:
        raise UserError(
            f"--model {given[other].source} must have its classes in the order of "
            f"{given[0].source}: a study asks all models for the same labels"
        )

    flops = [_asked(each, model, data) for each, model in zip(given, models, strict=True)]
    dense = [cost for model, cost in zip(models, flops, strict=True) if not routing_sites(model)]
    arms: dict[str, Arm] = {}
    sizes: dict[str, tuple[Arm, int, int]] = {}
    for each, model, cost in zip(given, models, flops, strict=True):
        equal_cost = is_equal_cost(cost, (dense or flops)[0])
        arm = arm_of(each.name, model, data.images[:1], equal_cost=equal_cost)
        arms[each.name] = arm
        size = (arm, cost, sum(parameter.numel() for parameter in model.parameters()))
        if sizes.setdefault(each.name, size) != size:
            raise UserError(
                f"--model {each} must be of the same architecture as the other models called "
                f"{each.name!r}, got (arm, FLOPs, parameters) {size} and {sizes[each.name]}"
            )
    found = [_entry(arms[each.name], each, data) for each in given]
    guesses = dict.fromkeys(note for _, note in matched if note)
    return found, replace(data, labels=labels[0], notes=[*data.notes, *guesses])


def _asked(given: HandedIn, model: nn.Module, data: ImageData) -> int:
    """The FLOPs of the forward pass of an image, after a look at what the model gives for two."""
    try:
        with torch.no_grad():
            logits = model.eval()(data.images[:2])
        if logits.shape[0] != min(2, len(data.images)) or logits.ndim != 2:
            raise ValueError(f"logits of shape {tuple(logits.shape)}")
        if not logits.isfinite().all():
            raise ValueError("logits that are not finite")
        return max(1, count_flops(model, tuple(data.images.shape[1:])))
    except Exception as error:
        raise UserError(
            f"--model {given} must give (B, classes) finite logits for images (B, C, S, S), got "
            f"{type(error).__name__}: {error}"
        ) from error


def is_equal_cost(flops: int, other: int) -> bool:
    """Whether FLOPs differ by 1 % at most."""
    return abs(flops / other - 1) <= WITHIN


def _entry(arm: Arm, given: HandedIn, data: ImageData) -> Entry:
    def get(_: Console) -> nn.Module:
        return _load(given.source, data).model

    return Entry(arm, given.training, given.seed, None, get)


def _load(source: str, data: ImageData) -> LoadedModel:
    is_file = source.lower().endswith(".safetensors")
    return load_model(
        Path(source) if is_file else None,
        None if is_file else source,
        torch.device(CPU),
        image_size=data.size,
    )
