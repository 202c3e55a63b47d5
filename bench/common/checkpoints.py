"""The two models that the demo compares, a V-MoE and the dense ViT of the same compute; their FLOPs
and their checkpoints."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ironmoe.moe import VMoE
from ironmoe.moe.checkpoints.errors import CheckpointError

ARCHITECTURES = ("V-MoE", "ViT")
DIM = 64
DEPTH = 4
HEADS = 4
MLP_DIM = 256
NUM_EXPERTS = 8
TOP_K = 2
MOE_LAYERS = (2, 3)
FORMAT = "ironmoe.VMoE/1"
WEIGHTS_FORMAT = "ironmoe.weights/1"


def architecture(name: str, image_shape: tuple[int, ...], num_classes: int) -> dict[str, Any]:
    """Keyword arguments of ``VMoE`` for one of ARCHITECTURES.

    Both have equal FLOPs: a token passes two experts of half the dense width.
    """
    channels, size, _ = image_shape
    common: dict[str, Any] = {
        "image_size": size,
        "patch_size": patch_size(size),
        "channels": channels,
        "num_classes": num_classes,
        "dim": DIM,
        "depth": DEPTH,
        "heads": HEADS,
        "mlp_dim": MLP_DIM,
        "stem": "conv",
        "classifier": "gap",
    }
    if name == "ViT":
        return common

    return common | {
        "moe_layers": MOE_LAYERS,
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "expert_dim": MLP_DIM // TOP_K,
    }


def patch_size(side: int) -> int:
    """A power of two that leaves about 4 × 4 tokens of an image up to 64 pixels wide."""
    return min(16, 2 ** max(1, int(math.log2(max(side / 3.5, 2)))))


def count_flops(model: nn.Module, image_shape: tuple[int, ...]) -> int:
    """FLOPs of the forward pass of one image, as torch.utils.flop_counter counts them in the
    operators that run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    training = model.training
    model.eval()

    # torch counts the products of unfused attention, but not those inside the fused CPU kernel
    try:
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):
            model(torch.zeros(1, *image_shape, device=device))
    finally:
        model.train(training)

    return counter.get_total_flops()


def save_checkpoint(model: nn.Module, arguments: dict[str, Any], extra: dict[str, Any]) -> bytes:
    """The content of a safetensors file: the weights, and as JSON in its metadata ``extra`` and how
    to build the model."""
    return save_weights(model.state_dict(), arguments, extra)


def save_weights(
    weights: Mapping[str, Tensor], arguments: dict[str, Any], extra: dict[str, Any]
) -> bytes:
    """``save_checkpoint`` of weights that are in no model."""
    metadata = {"format": FORMAT, "arguments": json.dumps(arguments), "extra": json.dumps(extra)}
    return save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)


def load_checkpoint(path: Path, device: torch.device) -> tuple[VMoE, dict[str, Any]]:
    """Read a file of ``save_checkpoint``. Nothing is unpickled.

    Returns:
        (the model in eval mode, extra)

    Raises:
        CheckpointError: the file cannot be read, or is no such file. The message names the file.
    """
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") == WEIGHTS_FORMAT:
        raise CheckpointError(
            f"checkpoint {path} holds weights alone, those of a model from elsewhere; take "
            f"--model … --weights {path}"
        )
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} must have format {FORMAT!r} in its metadata, got "
            f"{metadata.get('format')!r}; weights of another library need their model: --model "
            f"hf:FOLDER, or --model timm:NAME?checkpoint={path.name}"
        )

    try:
        model = VMoE(**json.loads(metadata["arguments"]))
        extra = json.loads(metadata["extra"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} describes a model that cannot be built: {error}"
        ) from error

    _fill(model, tensors, path)
    return model.to(device).eval(), extra


def arguments_of(path: Path) -> dict[str, Any]:
    """The arguments of ``VMoE`` in a file that ``load_checkpoint`` could read."""
    _, metadata = read_safetensors(path)
    return json.loads(metadata["arguments"])


def save_weights_alone(weights: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file for ``load_weights``."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    return save(tensors, {"format": WEIGHTS_FORMAT})


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the tensors of a safetensors file into a model that has their names and shapes.

    Raises:
        CheckpointError: the file cannot be read, or its tensors are those of another model.
    """
    tensors, _ = read_safetensors(path)
    _fill(model, tensors, path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors of a safetensors file by name, its metadata).

    Raises:
        CheckpointError: the file cannot be read.
    """
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is no file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())  # the file itself is no iterable
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read as safetensors: {error}"
        ) from error


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"checkpoint {path} holds weights of another architecture: {error}"
        ) from error
