"""The arms of the study: a dense ViT, and V-MoEs that differ from it, and from each other, in one
thing at a time."""

from typing import Any, NamedTuple

from ironmoe.bench.common.checkpoints import patch_size
from ironmoe.bench.common.user_error import UserError


class Size(NamedTuple):
    """Of all models of the ladder. moe_blocks: how many of the last blocks have experts."""

    dim: int = 48
    depth: int = 3
    heads: int = 4
    mlp_dim: int = 192
    moe_blocks: int = 2


class Arm(NamedTuple):
    """One architecture.

    experts: E, 0 for the dense model; top_k: K; renormalize: whether the gates of a token sum to 1
    (V-MoE's do not); equal_width: the experts are as wide as those with K = 2, and FLOPs grow with
    K. Else a token passes K experts that together cost, with the router, what the dense MLP costs.
    Of a model that was handed in, equal_width is whether its FLOPs are others.
    """

    name: str
    experts: int = 0
    top_k: int = 0
    renormalize: bool = False
    equal_width: bool = False

    @property
    def is_dense(self) -> bool:
        return self.experts == 0


DENSE = "dense"
EXPERTS = (2, 4, 8, 16, 32)
TOP_K = 2
FEWER_AND_MORE = (1, 4)
"""K beside TOP_K, of the arms with ``BASE_EXPERTS``."""
BASE_EXPERTS = 8


def _name(experts: int, top_k: int, renormalize: bool, equal_width: bool) -> str:
    parts = [f"E{experts}", f"K{top_k}" if top_k != TOP_K else ""]
    parts += ["wide" if equal_width else "", "renorm" if renormalize else ""]
    return "-".join(part for part in parts if part)


def _arm(experts: int, top_k: int, renormalize: bool, equal_width: bool = False) -> Arm:
    name = _name(experts, top_k, renormalize, equal_width)
    return Arm(name, experts, top_k, renormalize, equal_width)


def _ladder() -> dict[str, Arm]:
    arms = [Arm(DENSE)]
    for renormalize in (False, True):
        # With E = K the softmax sums to 1, so both kinds of gates are one and the same.
        arms += [_arm(e, TOP_K, renormalize) for e in EXPERTS if e > TOP_K or not renormalize]
        arms += [
            _arm(BASE_EXPERTS, top_k, renormalize, equal_width)
            for equal_width in (False, True)
            for top_k in FEWER_AND_MORE
        ]
    return {arm.name: arm for arm in arms}


LADDER = _ladder()
"""Name → arm: "dense"; "E8": 8 experts, of which a token takes 2; "E8-K1", "E8-K4": it takes 1 or
4 at equal FLOPs; "E8-K4-wide": at equal width of an expert; "-renorm": its gates sum to 1."""


def arguments(
    arm: Arm, image_shape: tuple[int, ...], num_classes: int, size: Size
) -> dict[str, Any]:
    """Keyword arguments of ``VMoE`` for images of this shape (C, S, S).

    Raises:
        UserError: experts would have no width left.
    """
    channels, side, _ = image_shape
    common: dict[str, Any] = {
        "image_size": side,
        "patch_size": patch_size(side),
        "channels": channels,
        "num_classes": num_classes,
        "dim": size.dim,
        "depth": size.depth,
        "heads": size.heads,
        "mlp_dim": size.mlp_dim,
        "stem": "conv",
        "classifier": "gap",
    }
    if arm.is_dense:
        return common

    return common | {
        "moe_layers": list(range(size.depth - size.moe_blocks, size.depth)),
        "num_experts": arm.experts,
        "top_k": arm.top_k,
        "expert_dim": expert_dim(arm, size),
        "router": {"renormalize": arm.renormalize},
    }


def expert_dim(arm: Arm, size: Size) -> int:
    """Hidden width of an expert.

    A token costs 4 · K · D · F + 2 · D · E FLOPs with experts and 4 · D · mlp_dim without; the
    width F makes both equal, so the router is paid for by its experts.
    """
    top_k = TOP_K if arm.equal_width else arm.top_k
    width = round((size.mlp_dim - arm.experts / 2) / top_k)
    if width < 1:
        raise UserError(
            f"mlp_dim must be more than E / 2 + K = {arm.experts / 2 + top_k:g} for arm "
            f"{arm.name!r}, got {size.mlp_dim}"
        )
    return width
