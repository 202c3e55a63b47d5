"""Numbers of routing, by the name under which users import them."""

from ironmoe.moe.routing.metrics import (
    READINGS,
    boundary_mass,
    dormant_experts,
    entropy,
    expert_cosine,
    expert_distance,
    expert_outputs,
    image_overlap,
    imbalance,
    load_variation,
    margin_histogram,
    routing_change,
    routing_entropy,
    routing_iou,
    swap_jump,
    token_overlap,
)

__all__ = [
    "READINGS",
    "boundary_mass",
    "dormant_experts",
    "entropy",
    "expert_cosine",
    "expert_distance",
    "expert_outputs",
    "image_overlap",
    "imbalance",
    "load_variation",
    "margin_histogram",
    "routing_change",
    "routing_entropy",
    "routing_iou",
    "swap_jump",
    "token_overlap",
]
