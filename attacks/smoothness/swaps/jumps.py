"""How far the output jumps where a token changes an expert: one choice, forced both ways.

Shape suffixes: B images, T tokens of all images, K choices, D width of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.extra import Extra
from ironmoe.attacks.losses import margin
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.routing.layers import by_image, by_token, members_of, one_pass
from ironmoe.attacks.smoothness.asking import Asked, asked_about, chunks
from ironmoe.attacks.smoothness.labels import check_labels, right_classes
from ironmoe.attacks.smoothness.layers import layer_names, layer_outputs
from ironmoe.attacks.smoothness.separate import measured
from ironmoe.attacks.smoothness.swaps.nearest import Swaps
from ironmoe.kernels import Routing
from ironmoe.moe.routing.gates import gates_for
from ironmoe.moe.routing.intervene import intervene
from ironmoe.moe.routing.routed_layers import Decision, routing_sites


@dataclass(repr=False)
class SwapJumps:
    """What one change of an expert does to each of B images: 0 for images without a swap, NaN where
    the model routes the token in another way than at the swap, so that nothing could be forced.

    logits:        (B,) float64, ‖z′ − z‖₂ of the logits with the other expert and with its own
    margins:       (B,) float64, change of the right logit minus the best wrong one
    layer_outputs: (B,) float64, ‖y′ − y‖₂ of the output of the layer where it happens, over all
        tokens of the image
    swapped:       (B,) bool: there is a swap
    """

    logits: Tensor
    margins: Tensor
    layer_outputs: Tensor
    swapped: Tensor

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        jumps = self.logits[self.swapped]
        lost = int(jumps.isnan().sum())
        median = f", median of the logits {float(jumps.nanmedian()):.3g}" if len(jumps) else ""
        return (
            f"SwapJumps({len(jumps)} of {len(self.logits)} images{median}"
            f"{f', {lost} not forced' if lost else ''})"
        )


class _Places(NamedTuple):
    """One token of each of B images: the place of its layer in ``Swaps.layers`` (−1: none), its
    position, and the two experts; all (B,) int64."""

    layer: Tensor
    token: Tensor
    leaving: Tensor
    coming: Tensor

    def part(self, places: slice) -> "_Places":
        return _Places(*(values[places] for values in self))


def swap_jumps(
    model: Any,
    x: Tensor,
    swaps: Swaps,
    which: str | tuple[str, int] = "nearest",
    *,
    labels: Tensor | None = None,
    batch_size: int = 64,
    extra: Extra | None = None,
) -> SwapJumps:
    """The jump of one swap of each image, by two forward passes: in both the one choice is forced,
    once to the expert that the token has, once to the other.

    The other expert takes the place of the first, and the router's rule gives the new set its
    gates; so all K gates change where they are renormalised. Where the rule is not known (Hugging
    Face) it takes the gate of the first. All other tokens of the layer keep their choices, a
    capacity drops by what is then chosen, and later layers route freely in both passes, as they do
    in the real jump.

    At ``x`` both gates are those of the image, which lies ``swaps.nearest`` before the swap. At
    ``x + swaps.steps`` they are those of the swap itself, to first order; the call takes such
    images, too. If the token has neither of the two experts there, or both, the jump is NaN.

    Args:
        model: as in ``nearest_swaps``.
        x: (B, …) the images of ``swaps``, or those at the swaps.
        swaps: what ``nearest_swaps`` returned.
        which: "nearest", the nearest swap of each image; or (layer name, position), the swap of
            this token in every image.
        labels: (B,) int64, the right classes of ``margins``; None: those that the model names.
        batch_size, extra: as in ``nearest_swaps``.

    Returns:
        ``SwapJumps``.

    Raises:
        ValueError: swaps of another number of images, or of another model; a layer or token that
            they do not hold; images that influence each other; labels that are no class.
        TypeError: images, labels or logits that are none; a model that is no nn.Module.
    """
    check_counts(1, batch_size=batch_size)
    asked, x = asked_about(model, x, extra)
    if len(swaps.nearest) != len(x):
        raise ValueError(
            f"swaps must be those of the {len(x)} images of x, got swaps of {len(swaps.nearest)}"
        )
    unknown = set(swaps.layers) - set(layer_names(model, None))
    if unknown:
        raise ValueError(
            f"swaps must be those of model, got layers that it lacks: {sorted(unknown)}"
        )
    check_labels(labels, len(x))
    chosen = _places(swaps, which)

    with measured(asked, x), torch.no_grad():
        parts = [
            _jumps_of(
                asked.part(places),
                x[places],
                list(swaps.layers),
                chosen.part(places),
                None if labels is None else labels[places],
            )
            for places in chunks(len(x), batch_size)
        ]
    nothing = swaps.nearest[:0]
    parts = parts or [(nothing, nothing, nothing)]
    logits, margins, of_layer = (torch.cat(values) for values in zip(*parts, strict=True))
    return SwapJumps(logits, margins, of_layer, swapped=chosen.layer >= 0)


def _places(swaps: Swaps, which: str | tuple[str, int]) -> _Places:
    """The token of each image whose choice is forced."""
    if which == "nearest":
        leaving = torch.full_like(swaps.layer, -1)
        coming = leaving.clone()
        for number, layer in enumerate(swaps.layers.values()):
            in_layer = swaps.layer == number
            column = (layer.tokens == swaps.token[:, None]).int().argmax(1, keepdim=True)
            leaving = torch.where(in_layer, layer.leaving.gather(1, column)[:, 0], leaving)
            coming = torch.where(in_layer, layer.coming.gather(1, column)[:, 0], coming)
        return _Places(swaps.layer, swaps.token, leaving, coming)

    if not isinstance(which, tuple) or len(which) != 2:
        raise ValueError(f'which must be "nearest" or (layer name, position), got {which!r}')
    name, token = which
    names = list(swaps.layers)
    if name not in names or token not in swaps.layers[name].tokens.tolist():
        raise ValueError(
            f'which must be "nearest" or a layer among {", ".join(names) or "none"} and a position '
            f"that swaps hold, got {which!r}"
        )
    layer = swaps.layers[name]
    here = layer.tokens.tolist().index(token)
    exists = layer.real[:, here] & layer.gaps[:, here].isfinite()
    return _Places(
        layer=torch.where(exists, names.index(name), -1),
        token=torch.full_like(swaps.token, token),
        leaving=layer.leaving[:, here],
        coming=layer.coming[:, here],
    )


def _jumps_of(
    asked: Asked, x: Tensor, names: Sequence[str], chosen: _Places, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(jump of the logits, of the margins, of the layer's output) of one batch, each (B,)."""
    swapped = chosen.layer >= 0
    if not bool(swapped.any()):
        nothing = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return nothing, nothing, nothing

    back = chosen._replace(leaving=chosen.coming, coming=chosen.leaving)
    before, outputs_before, lost = _forced(asked, x, names, back)
    after, outputs_after, _ = _forced(asked, x, names, chosen)

    right = right_classes(labels, before)
    has_others = before.shape[1] > 1
    margins = margin(before, right) - margin(after, right) if has_others else 0 * before[:, 0]
    at_layer = torch.zeros_like(margins)
    for number, name in enumerate(names):
        if name in outputs_before:
            change = (outputs_after[name] - outputs_before[name]).flatten(1).norm(dim=1)
            at_layer = torch.where(chosen.layer == number, change, at_layer)

    def known(jumps: Tensor) -> Tensor:
        return jumps.masked_fill(~swapped, 0).masked_fill(lost, math.nan)

    return known((after - before).norm(dim=1)), known(margins), known(at_layer)


def _forced(
    asked: Asked, x: Tensor, names: Sequence[str], chosen: _Places
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """((B, C) float64 logits, name → (B, N, D) float64 outputs of the layers, (B,) bool what could
    not be forced) where each chosen token has ``coming`` and not ``leaving``."""
    sites = routing_sites(asked.model)
    used = [name for number, name in enumerate(names) if bool((chosen.layer == number).any())]
    edits = {
        name: _Forcing(chosen, chosen.layer == names.index(name), members_of(sites[name]))
        for name in used
    }

    def edit(decision: Decision) -> Routing:
        return edits[decision.layer](decision)

    with intervene(asked.model, edit, layers=used), layer_outputs(asked.model, used) as outputs:
        logits = asked(x)
    of_images = {
        name: by_image(one_pass(name, outputs[name]), len(x), members_of(sites[name])).double()
        for name in used
    }
    lost = torch.stack([each.lost for each in edits.values()]).any(0)
    return logits.double(), of_images, lost


class _Forcing:
    """The policy of one layer, for the images whose chosen token is in it (``here``, (B,) bool).

    lost: (B,) bool, the token has neither of its two experts, or both, and keeps its choice
    """

    def __init__(self, chosen: _Places, here: Tensor, members: int) -> None:
        self.chosen = chosen
        self.here = here
        self.members = members
        self.lost = torch.zeros_like(here)

    def __call__(self, decision: Decision) -> Routing:
        self._check(decision)
        experts_TK = decision.routing.experts
        leaving_T1 = self._of_tokens(self.chosen.leaving, decision)
        coming_T1 = self._of_tokens(self.chosen.coming, decision)
        has_one_T1 = (experts_TK == leaving_T1).any(1, keepdim=True) ^ (
            experts_TK == coming_T1
        ).any(1, keepdim=True)
        lost_T1 = (leaving_T1 >= 0) & ~has_one_T1
        self.lost = by_image(lost_T1, len(self.here), self.members).flatten(1).any(1)

        forced_T1 = (leaving_T1 >= 0) & has_one_T1
        replaced_TK = forced_T1 & (experts_TK == leaving_T1)
        other_TK = torch.where(replaced_TK, coming_T1.to(experts_TK), experts_TK)
        gates_TK = gates_for(decision, other_TK, None, decision.logits)
        own_TK = decision.routing.gates
        return Routing(torch.where(forced_T1, gates_TK.to(own_TK), own_TK), other_TK)

    def _check(self, decision: Decision) -> None:
        """ValueError: the layer has no such token or expert."""
        tokens_each = len(decision.x) // len(self.here)
        token, leaving, coming = (int(values[self.here].max()) for values in self.chosen[1:])
        expert = max(leaving, coming)
        if token >= tokens_each or expert >= decision.num_experts:
            raise ValueError(
                f"swaps must be those of model, got token {token} and expert {expert} in "
                f"{decision.layer!r}, which has {tokens_each} tokens an image and "
                f"{decision.num_experts} experts"
            )

    def _of_tokens(self, values: Tensor, decision: Decision) -> Tensor:
        """(B,) → (T, 1), those of the chosen tokens; −1 for all others."""
        tokens_each = len(decision.x) // len(self.here)
        nothing = values.new_full((len(self.here), tokens_each), -1)
        place = self.chosen.token.clamp_min(0)[:, None]
        of_image = torch.where(self.here, values, -1)[:, None]
        return by_token(nothing.scatter(1, place, of_image), self.members)[:, None]
