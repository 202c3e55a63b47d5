"""``vmoe:PREFIX``: a checkpoint of the official V-MoE code, or of the official ViT code."""

from pathlib import Path
from typing import Any

import torch

from ironmoe.bench.common.query import Reader, read_known
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.tensorflow_resize import TensorFlowResize
from ironmoe.bench.models.loaded import LoadedModel, facts_of
from ironmoe.bench.models.registry import Source, register_kind
from ironmoe.moe import Capacity, CheckpointError, VMoE, read_npz_checkpoint, read_vmoe_checkpoint


def _zero_or_one(text: str) -> int:
    if text not in ("0", "1"):
        raise ValueError(f"a switch must be 0 or 1, got {text!r}")
    return int(text)


KNOWN: dict[str, Reader] = {
    "top_k": int,
    "capacity": float,
    "images_per_group": int,
    "priority": _zero_or_one,
    "dispatch": str,
}


@register_kind("vmoe", form="vmoe:PREFIX", is_path=True)
def load_official(source: Source) -> LoadedModel:
    """A model of PREFIX?top_k=2&capacity=1.05&images_per_group=8&priority=1&dispatch=bfloat16.

    Its pixels are those of the official evaluation, ``decode|resize(size)|value_range(-1, 1)``
    (google-research/vmoe, vmoe/projects/adversarial_attacks/configs/attack/ilsvrc2012.py).

    Raises:
        CheckpointError: the files cannot be read, or the query is wrong.
    """
    given = read_known(source.spec, source.query, KNOWN)
    if given.get("dispatch", "bfloat16") != "bfloat16":
        raise CheckpointError(f"{source} may set dispatch=bfloat16 only, got {given['dispatch']!r}")
    prefix, side = source.path, _side(source)
    try:
        is_npz = prefix.lower().endswith(".npz")
        params = read_npz_checkpoint(prefix) if is_npz else read_vmoe_checkpoint(prefix)
        model = VMoE.from_jax(
            params,
            image_size=side,
            top_k=given.get("top_k"),
            capacity=_capacity(given),
            dispatch_dtype=torch.bfloat16 if "dispatch" in given else None,
        )
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error

    half = [0.5] * model.channels  # the official code's pixels lie in [−1, 1]
    stem = Path(prefix).stem
    return LoadedModel(
        Classifier(model, half, half),
        f"{'V-MoE' if model.first_moe < len(model.blocks) else 'ViT'} {stem}",
        (model.channels, model.image_size, model.image_size),
        None,
        facts_of(stem),
        pipeline=TensorFlowResize(
            (model.image_size, model.image_size),
            channels=model.channels,
            source="the official V-MoE evaluation",
        ),
    )


def _side(source: Source) -> int | None:
    """The side that the images have; None: the checkpoint's own."""
    if source.image_size is None:
        return None
    height, width = source.image_size
    if height != width:
        raise CheckpointError(
            f"{source} takes square images only, got an image size of {height} × {width}"
        )
    return height


def _capacity(given: dict[str, Any]) -> Capacity | None:
    """The limit of each expert's rows that the query asks for; None without one."""
    factor, group = given.get("capacity"), given.get("images_per_group")
    if factor is None:
        return None
    return Capacity(factor, images_per_group=group, priority=bool(given.get("priority")))
