"""From a model's name to a classifier of pixels."""

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from ironmoe.attacks.evaluation.checksum import unsaved_digest
from ironmoe.bench.common.query import split_query
from ironmoe.bench.models import kinds  # noqa: F401, it registers them
from ironmoe.bench.models.classifier import Classifier
from ironmoe.bench.models.kinds.function import FORM as FUNCTION
from ironmoe.bench.models.kinds.function import load_function
from ironmoe.bench.models.kinds.own import load_own
from ironmoe.bench.models.loaded import LoadedModel
from ironmoe.bench.models.overrides import Overrides
from ironmoe.bench.models.registry import KINDS, Kind, Source, file_kind, forms
from ironmoe.bench.models.weights import load_file_into
from ironmoe.moe.checkpoints.errors import CheckpointError

FORMS = f"{forms()} or {FUNCTION}"
AS_IS = Overrides()
DIGITS = 16  # of a SHA-256 in a name, which people read
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    checkpoint: Path | None,
    spec: str | None,
    device: torch.device,
    *,
    image_size: tuple[int, int] | None = None,
    weights: Path | None = None,
    overrides: Overrides = AS_IS,
) -> LoadedModel:
    """The model that a command names, on ``device`` and in eval mode.

    Args:
        checkpoint: a file that the demo wrote, or None.
        spec: one of FORMS, or None. ``dtype=float32`` among what follows the question mark changes
            the dtype of the weights.
        image_size: (height, width) of the images that it will get, where the data or the user
            dictates it; a model that can be built for a size is.
        weights: a safetensors file whose tensors replace those of the model of ``spec``, or None.
        overrides: another preprocessing than the model's own.

    Raises:
        CheckpointError: there is not exactly one name, or the model cannot be loaded.
        UserError: an override does not suit the model.
    """
    _check_one_name(checkpoint, spec, weights)
    if checkpoint is not None:
        return overrides.apply(load_own(checkpoint, device))

    assert spec is not None
    loaded = overrides.apply(_load(spec, device, image_size))
    if weights is not None:
        load_file_into(loaded.model, weights)
    return loaded._replace(model=loaded.model.to(device).eval())


def _check_one_name(checkpoint: Path | None, spec: str | None, weights: Path | None) -> None:
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


def _load(spec: str, device: torch.device, image_size: tuple[int, int] | None) -> LoadedModel:
    """The model of ``spec``, with what names it."""
    path, query = split_query(spec)
    prefix, colon, rest = path.partition(":")
    kind = KINDS.get(prefix) if colon else None

    of_file = file_kind(path)
    if kind is None and of_file is not None:
        kind, rest = of_file, path
    if kind is None:
        if not rest:
            raise CheckpointError(f"--model must be {FORMS}, got {spec!r}")
        kind, rest = Kind(FUNCTION, load_function), path  # all that it sets is the function's
        dtype = None
    else:
        dtype = query.pop("dtype", None)
    if not rest or (dtype is not None and dtype not in DTYPES):
        wanted = kind.form if not rest else f"of dtype {', '.join(DTYPES)}"
        raise CheckpointError(f"--model must be {wanted}, got {spec!r}")

    loaded = kind.load(Source(spec, rest, query, device, image_size))
    if dtype is not None:
        _cast(loaded.model, DTYPES[dtype])
    identity = spec
    unsaved = unsaved_digest(loaded.model) if kind.form == FUNCTION else None
    if unsaved is not None:  # who wrote the function may change them, as a mean and a std
        identity += f" (tensors beside its weights: SHA-256 {unsaved[:DIGITS]})"
    if kind.is_path:  # the same from every folder
        head = f"{prefix}:" if prefix in KINDS else ""
        identity = head + os.path.abspath(spec.removeprefix(head)) + _content(Path(rest))
    return loaded._replace(source=f"--model {spec}", identity=identity)


def _content(path: Path) -> str:
    """The digest of a file, or of the configuration in a folder, since weights are not all that a
    model computes with; nothing where there is neither."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return f" (SHA-256 {digest.hexdigest()[:DIGITS]})"


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights and buffers in another dtype; the normalization stays float32."""
    inner = model.model if isinstance(model, Classifier) else model
    inner.to(dtype)
