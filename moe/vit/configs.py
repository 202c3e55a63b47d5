"""The families of the papers by name: ViT and V-MoE in sizes S to H.

This file does not know ``VMoE``: ``VMoE.from_config`` hands its class in.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ironmoe.moe.routers.top_k import router_options

Model = TypeVar("Model")


class Size(NamedTuple):
    """dim: D; depth: blocks; mlp_dim: F; heads: attention heads."""

    dim: int
    depth: int
    mlp_dim: int
    heads: int


# B+, B++ and B+++ lie between B and L: the paper's dense models of more compute (arXiv 2210.10253)
SIZES = {
    "S": Size(512, 8, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "B+": Size(832, 15, 3328, 13),
    "B++": Size(896, 18, 3584, 14),
    "B+++": Size(960, 21, 3840, 15),
    "L": Size(1024, 24, 4096, 16),
    "H": Size(1280, 32, 5120, 16),
}


def from_config(cls: Callable[..., Model], name: str, **options: Any) -> Model:
    """A model of the papers by name.

    Args:
        cls: ``VMoE``.
        name: "ViT-S/32", "V-MoE-B/16", …: sizes S, B, B+, B++, B+++, L and H; any patch size that
            divides ``image_size``.
        options: ``image_size`` (224), ``num_classes`` (1000), ``representation_size`` (as wide as
            the model, as in the papers; None leaves the layer out), and any other argument of
            ``VMoE``. For "V-MoE": ``moe_layers`` ("every 2", "last 2" or indices; default "every
            2"), ``num_experts`` (8), ``top_k`` (2). Auxiliary losses are the papers': importance
            and load 0.005, with two experts or fewer the GShard loss 0.01, because the load loss
            can be NaN there.

    Dropless by default; the papers train with ``capacity=Capacity(1.05, images_per_group=8)`` and
    ``dispatch_dtype=torch.bfloat16``.
    """
    match = re.fullmatch(r"(ViT|V-MoE)-(\S+)/(\d+)", name)
    if match is None or match[2] not in SIZES:
        raise ValueError(
            "name must be ViT-SIZE/PATCH or V-MoE-SIZE/PATCH with SIZE one of "
            f"{', '.join(SIZES)}, got {name!r}"
        )
    size = SIZES[match[2]]
    num_classes = options.pop("num_classes", 1000)
    settings: dict[str, Any] = size._asdict() | {
        "image_size": 224,
        "patch_size": int(match[3]),
        "num_classes": num_classes,
        "representation_size": size.dim,
        "head_bias": -math.log(num_classes),
    }
    if match[1] == "ViT":
        given = {
            "moe_layers",
            "num_experts",
            "top_k",
            "expert_dim",
            "router",
            "capacity",
            "make_moe",
        } & set(options)
        if given:
            raise ValueError(
                f"a dense {name} takes no {', '.join(sorted(given))}; take "
                f"V-MoE-{match[2]}/{match[3]}"
            )
        return cls(**settings | options)
    num_experts = options.get("num_experts", 8)
    settings["moe_layers"] = "every 2"
    if num_experts <= 2:
        settings["router"] = {"importance_weight": 0.0, "load_weight": 0.0, "balance_weight": 0.01}
    settings["router"] = settings.get("router", {}) | router_options(options.pop("router", None))
    return cls(**settings | options)
