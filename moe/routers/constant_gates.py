"""A warning about one expert a token whose gate is always the same number: then nothing that the
experts compute depends on the router's weights, and the task never trains them."""

import warnings
from typing import Any

import torch

Device = torch.device | str | None


def warn_of_constant_gate(router: Any, device: Device) -> None:
    """UserWarning if the arguments of this ``TopKRouter`` make every gate the same. None on the
    meta device, where layers are made on trial."""
    given = []
    if router.order == "topk_first" and router.score == "softmax":
        given.append("order='topk_first' with a softmax")
    if router.renormalize:
        given.append(f"renormalize={router.renormalize}")
    if given and router.top_k == 1 < router.num_experts:
        remedy = "order='score_first' and " if len(given) > 1 or not router.renormalize else ""
        _warn(" and ".join(given), f"{remedy}renormalize=False in the router", device)


def warn_of_constant_gate_after(capacity: Any, router: Any, device: Device) -> None:
    """UserWarning if this capacity divides the only gate of a token by itself."""
    alone = getattr(router, "top_k", 0) == 1 < getattr(router, "num_experts", 0)
    if alone and getattr(capacity, "renormalize", False):
        _warn("renormalize=True in the capacity", "renormalize=False in the capacity", device)


def _warn(given: str, remedy: str, device: Device) -> None:
    if device is None or torch.device(device).type != "meta":
        warnings.warn(
            f"top_k=1 and {given} give every token the same gate, whatever the router's weights "
            f"are, so the task never trains the router. Set {remedy}: the gate is then the score "
            "of the expert",
            UserWarning,
            stacklevel=4,
        )
