"""Weights of the official JAX V-MoE and ViT code, into a ``VMoE`` and back.

``jax_leaves`` knows their names and layouts; this file reads the sizes of a model from them and
copies. It does not know ``VMoE``, whose methods hand the class or the model in.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from ironmoe.moe.checkpoints.errors import some_names
from ironmoe.moe.layers.soft import SoftMoE
from ironmoe.moe.sharded import give_back_gathered
from ironmoe.moe.vit.jax_leaves import VisionTransformer, leaves_of
from ironmoe.moe.vit.positions import resize_positions
from ironmoe.moe.vit.sizes import check_sizes

_POSITIONS = "Encoder/posembed_input/pos_embedding"

# Names that vit_jax has used over the years → the names of V-MoE.
OLD_NAMES = (
    (r"^Transformer/", "Encoder/"),
    (r"(encoderblock_\d+)/MultiHeadDotProductAttention_\d+/", r"\1/SelfAttention/"),
    (r"(encoderblock_\d+)/MlpBlock_\d+/", r"\1/Mlp/"),
    (r"(encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
)

Model = TypeVar("Model", bound=VisionTransformer)


def from_jax(
    cls: Callable[..., Model],
    params: Mapping[str, np.ndarray],
    *,
    image_size: int | None = None,
    heads: int | None = None,
    top_k: int | None = None,
    shard: Callable[[Model], object] | None = None,
    **options: Any,
) -> Model:
    """The model of an official checkpoint, in eval mode. Everything the arrays tell is read from
    them.

    The official code works on images (B, H, W, 3) in [−1, 1]; this model on (B, 3, H, W).

    Args:
        cls: ``VMoE``.
        params: names to arrays, as ``read_vmoe_checkpoint`` and ``read_npz_checkpoint`` give them,
            or to arrays in files (``open_vmoe_checkpoint``), which are read one after another.
        image_size: in pixels; if it is not the checkpoint's, the position embeddings are resized.
        heads: checked if given.
        top_k: K, which no array tells; needed for a model with top-k routers.
        shard: called with the model before it has memory, to share it out over processes, such as
            ``lambda model: parallelize(model, mesh)``. Each process then has memory for its part,
            on the mesh's kind of device, and takes that from the arrays.
        options: other arguments of ``VMoE``. For the same function as the official configurations:
            ``capacity=Capacity(factor, images_per_group=group_size / tokens)``,
            ``dispatch_dtype=torch.bfloat16``.

    Raises:
        ValueError: arrays are missing, left over, or of the wrong shape; it names them.
    """
    params = _official_names(params)
    settings = _settings(_Shapes(params), heads, top_k, options)
    if image_size is not None and image_size != settings["image_size"]:
        kinds = {"stem": "patch", "classifier": settings["classifier"]}
        check_sizes(image_size, settings["patch_size"], dim=1, depth=1, heads=1, **kinds)
        settings["image_size"] = image_size
        params[_POSITIONS] = _resized(params[_POSITIONS], settings)

    if shard is None:
        model = cls(**settings | options)
    else:
        with torch.device("meta"):
            model = cls(**settings | options)
        shard(model)
        _give_memory(cast(nn.Module, model))
    _fill(model, params)
    model.eval()
    return model


def load_jax(model: VisionTransformer, params: Mapping[str, np.ndarray]) -> None:
    """Set the weights of a model to those of an official checkpoint of its sizes. The model may be
    sharded; each process then takes its part. ``params`` and errors as in ``from_jax``."""
    _fill(model, _official_names(params))


def to_jax(model: VisionTransformer) -> dict[str, np.ndarray]:
    """Names to float32 arrays, as the official V-MoE code names and shapes them: what
    ``write_vmoe_checkpoint`` takes. The parts of a sharded model are gathered; all its processes
    must call it, and get all arrays."""
    arrays = ((leaf.name, leaf.to_array().detach().float()) for leaf in leaves_of(model))
    return {name: array.cpu().numpy().copy() for name, array in arrays}


def _settings(
    shape: "_Shapes", heads: int | None, top_k: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``VMoE`` that the arrays tell."""
    names = shape.params
    patch, _, channels, dim = shape("embedding/kernel", 4)
    _, depth_heads, _ = shape("Encoder/encoderblock_0/SelfAttention/query/kernel", 3)
    if heads not in (None, depth_heads):
        raise ValueError(f"heads must be {depth_heads}, as the checkpoint has them, got {heads}")

    matches = (re.match(r"Encoder/encoderblock_(\d+)/", name) for name in names)
    blocks = [int(match[1]) for match in matches if match]
    has_experts = {i for i in blocks if f"Encoder/encoderblock_{i}/Moe/Mlp/Dense_0/kernel" in names}
    dense = [i for i in blocks if i not in has_experts]
    tokens = shape(_POSITIONS, 3)[1] - ("cls" in names)
    settings: dict[str, Any] = {
        "image_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "channels": channels,
        "dim": dim,
        "heads": depth_heads,
        "depth": max(blocks) + 1,
        "num_classes": shape("head/kernel", 2)[1],
        "moe_layers": sorted(has_experts),
        "classifier": "token" if "cls" in names else "map" if "MapHead/probe" in names else "gap",
        "representation_size": None,
    }

    if "pre_logits/kernel" in names:
        settings["representation_size"] = shape("pre_logits/kernel", 2)[1]
    if dense:
        settings["mlp_dim"] = shape(f"Encoder/encoderblock_{dense[0]}/Mlp/Dense_0/kernel", 2)[1]
    if has_experts:
        settings |= _moe_settings(shape, min(has_experts), top_k, options)
        settings.setdefault("mlp_dim", settings["expert_dim"])
    elif top_k is not None:
        raise ValueError(f"top_k must be None for a checkpoint without experts, got {top_k}")
    return settings


def _moe_settings(
    shape: "_Shapes", block: int, top_k: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``VMoE`` that describe the experts; ``block`` is the first that has some.

    A Soft MoE is built by ``make_moe``, which gets ``dispatch_dtype``: it is taken out of
    ``options``.
    """
    prefix = f"Encoder/encoderblock_{block}/Moe"
    num_experts, dim, expert_dim = shape(f"{prefix}/Mlp/Dense_0/kernel", 3)
    settings: dict[str, Any] = {"num_experts": num_experts, "expert_dim": expert_dim}
    if f"{prefix}/Router/mu" in shape.params:
        slots = shape(f"{prefix}/Router/mu", 3)[2]
        soft = {"activation": "gelu_tanh", "dispatch_dtype": options.pop("dispatch_dtype", None)}
        make_moe = partial(SoftMoE, dim, expert_dim, num_experts, slots, **soft)
        return settings | {"make_moe": make_moe}

    if "make_moe" not in options and top_k is None:
        raise ValueError(
            f"top_k must be given for a checkpoint with {num_experts} experts: no array tells it"
        )
    router = shape.params.get(f"{prefix}/Router/dense/kernel")
    members = router.shape[1] if router is not None and router.ndim == 3 else 1
    return settings | {"top_k": top_k or 1, "ensemble_size": members}


def _resized(positions: Any, settings: Mapping[str, Any]) -> np.ndarray:
    """The position embeddings for the image size and the classifier in the settings."""
    side = math.ceil(settings["image_size"] / settings["patch_size"])
    whole = torch.from_numpy(np.array(positions, np.float32))
    return resize_positions(whole, side, settings["classifier"] == "token").numpy()


def _give_memory(model: nn.Module) -> None:
    """Memory for the parameters and buffers of a model that is made on the meta device. A
    checkpoint has no buffers: they get their first values."""
    meshes = (getattr(p, "device_mesh", None) for p in model.parameters())
    device = next((mesh.device_type for mesh in meshes if mesh is not None), "cpu")
    model.to_empty(device=device)
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):
            reset: Any = module.reset_parameters
            reset()


def _fill(model: VisionTransformer, params: Mapping[str, np.ndarray]) -> None:
    """Copy every array into the model; ValueError where one is missing, left over or misshapen."""
    give_back_gathered(cast(nn.Module, model))
    leaves = list(leaves_of(model))
    missing = {leaf.name for leaf in leaves if leaf.name not in params}
    unused = set(params) - {leaf.name for leaf in leaves}
    if missing or unused:
        raise ValueError(
            f"params must hold the arrays of one model; missing: {some_names(missing)}; not known: "
            f"{some_names(unused)}"
        )
    for leaf in leaves:
        shape = np.shape(params[leaf.name])
        if shape != leaf.shape:
            raise ValueError(f"params[{leaf.name!r}] must have shape {leaf.shape}, got {shape}")

    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_from(params[leaf.name])


class _Shapes:
    """Shapes of the arrays by name. ValueError if one has another number of axes."""

    def __init__(self, params: Mapping[str, np.ndarray]) -> None:
        self.params = params

    def __call__(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.params:
            raise ValueError(
                f"params must hold {name!r} like every checkpoint of ViT or V-MoE, got "
                f"{some_names(self.params)}"
            )
        shape = np.shape(self.params[name])
        if len(shape) != axes:
            raise ValueError(f"params[{name!r}] must have {axes} axes, got shape {shape}")
        return shape


def _official_names(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, array in params.items():
        for old, new in OLD_NAMES:
            name = re.sub(old, new, name)
        renamed[name] = array if hasattr(array, "shape") else np.asarray(array)
    return renamed
