"""Weights of a file for a model of timm: as timm saves them, or as it converts those of others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torch import Tensor, nn

from ironmoe.bench.models.offline import nothing_downloaded
from ironmoe.bench.models.registry import Source
from ironmoe.bench.models.weights import WrongWeights, load_file_into, load_into, read_weights
from ironmoe.moe.checkpoints.errors import CheckpointError

ARRAYS = {".npz", ".npy"}
RESAMPLED_FOR = {"img_size", "patch_size", "window_size"}


def load_weights(
    timm: Any, source: Source, arguments: Mapping[str, Any], model: nn.Module, path: Path
) -> None:
    """Give a model of timm the weights of a file, all of them.

    A file with other names or shapes, such as those that the authors of Swin or ConvNeXt published,
    goes through the filter that timm has for its model (``checkpoint_filter_fn`` in its source).
    That filter may also resample, such as position embeddings for another size: it may do so where
    the arguments ask for one.

    Args:
        arguments: of ``create_model``, by which the model was made.

    Raises:
        CheckpointError: the file cannot be read, or does not fit by either way; it says what to do.
    """
    if path.suffix.lower() in ARRAYS:
        raise CheckpointError(
            f"{source} must have a checkpoint with tensors by name, got {path}. If it is a ViT of "
            f"the official code, vmoe:{path} reads it; or let timm convert it once: python -c "
            f"\"import timm, torch; model = timm.create_model('{source.path}'); "
            f"model.load_pretrained('{path}'); torch.save(model.state_dict(), 'weights.pth')\""
        )
    try:
        return load_file_into(model, path)
    except WrongWeights as error:
        tensors = read_weights(path)
        converted = _converted(timm, source, arguments, tensors)
        if converted is None:
            raise
        resampled = _resampled(tensors, converted, arguments)
        if resampled:
            raise WrongWeights(
                f"{error}. These weights are for another size: img_size=SIZE after the question "
                f"mark builds the model for it, or lets timm resample {', '.join(resampled[:3])}"
            ) from error
    load_into(model, converted, path)


def _resampled(
    tensors: Mapping[str, Tensor], converted: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> list[str]:
    """What timm would resample though the arguments ask for no size: position embeddings and
    patches with numbers of elements that no tensor of the file has."""
    if RESAMPLED_FOR & arguments.keys():
        return []
    sizes = {value.numel() for value in tensors.values()}
    kinds = ("pos",) if "in_chans" in arguments else ("pos", "patch_embed")
    return [
        name
        for name, value in converted.items()
        if any(kind in name for kind in kinds) and value.numel() not in sizes
    ]


def _converted(
    timm: Any, source: Source, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The tensors that timm would load for these; None where it cannot take them."""
    overlay: dict[str, Any] = {"state_dict": dict(tensors)}
    if "num_classes" in arguments:  # else timm leaves out a head that has another number
        overlay["num_classes"] = arguments["num_classes"]
    try:
        with nothing_downloaded(source), _loaded_weights() as loaded:
            timm.create_model(
                source.path, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
            )
    except Exception:  # its filters take for granted that a file is one that they know
        return None
    return loaded or None


@contextmanager
def _loaded_weights() -> Iterator[dict[str, Tensor]]:
    """What models load inside the block, which is kept and not loaded."""
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, state: Mapping[str, Tensor], *others: Any, **named: Any) -> Any:
        kept.update(state)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    with mock.patch.object(nn.Module, "load_state_dict", keep):
        yield kept
