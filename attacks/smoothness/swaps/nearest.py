"""How far the nearest change of routing is, of every token and every image.

Where a token changes an expert, a mixture of experts is not continuous: its output jumps, and no
derivative sees that. To first order the place where it happens is as far away as the gap between
two router logits over the length of its gradient with respect to the image.

Shape suffixes: B images, N tokens of an image (those of all members in an ensemble).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.abilities import HyperplaneBall
from ironmoe.attacks.balls.ball import ball_of, norms_with
from ironmoe.attacks.engine.attempts import where
from ironmoe.attacks.extra import Extra
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.routing.layers import by_image, members_of, one_pass
from ironmoe.attacks.smoothness.asking import Asked, asked_about, chunks
from ironmoe.attacks.smoothness.layers import (
    deciding,
    layer_names,
    layer_outputs,
    output_weights,
    token_matters,
)
from ironmoe.attacks.smoothness.separate import measured
from ironmoe.attacks.smoothness.swaps.choices import Choices, choices_of
from ironmoe.attacks.smoothness.swaps.token_swaps import PAIRS, TokenSwap, nearest_of_token
from ironmoe.moe.routing.routed_layers import routing_sites

NOWHERE = -1  # the layer and the token of an image without a swap


class LayerSwaps(NamedTuple):
    """The swaps of one layer: of each token the one that was looked at, or the nearest of them.

    distances: (B, n) float64, to first order, in the norm; inf where there is no swap, or where no
        small change of the image moves the gap
    gaps:      (B, n), difference of the two logits, or, with a selection bias, of what the router
        compares; inf where there is no swap
    leaving:   (B, n) int64, the expert that the token would lose; E without a swap
    coming:    (B, n) int64, the expert that it would get; E without a swap
    real:      (B, n) bool, False for padding
    matters:   (B, n) bool, a logit depends on what the layer gives for the token; in a layer with a
        capacity, for any token of the image
    tokens:    (n,) int64, the positions of these tokens in the image
    """

    distances: Tensor
    gaps: Tensor
    leaving: Tensor
    coming: Tensor
    real: Tensor
    matters: Tensor
    tokens: Tensor


@dataclass(repr=False)
class Swaps:
    """The nearest changes of routing of B images.

    norm:    the norm in which distances are measured
    layers:  name → LayerSwaps, in the model's order; {} for a model that routes nothing
    nearest: (B,) float64, the least distance over layers and tokens that matter; inf where there is
        no swap
    layer:   (B,) int64, the place of its layer in ``layers``; −1 where there is none
    token:   (B,) int64, the position of its token; −1 where there is none
    steps:   (B, …) the shortest step that closes the gap to first order, of length ``nearest``; 0
        where there is none
    """

    norm: str
    layers: dict[str, LayerSwaps]
    nearest: Tensor
    layer: Tensor
    token: Tensor
    steps: Tensor

    def part(self, places: slice) -> "Swaps":
        """Those of some of the images."""
        layers = {}
        for name, layer in self.layers.items():
            of_images = {field: values[places] for field, values in layer._asdict().items()}
            layers[name] = LayerSwaps(**(of_images | {"tokens": layer.tokens}))
        nearest = (self.nearest, self.layer, self.token, self.steps)
        return Swaps(self.norm, layers, *(values[places] for values in nearest))

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        median = f", median {float(self.nearest.median()):.3g}" if len(self.nearest) else ""
        return (
            f"Swaps({len(self.nearest)} images, {len(self.layers)} layers, nearest in "
            f"{self.norm}{median})"
        )


def nearest_swaps(
    model: Any,
    x: Tensor,
    *,
    norm: str = "Linf",
    layers: Sequence[str | int] | None = None,
    tokens: Sequence[int] | None = None,
    pairs: str = "all",
    batch_size: int = 64,
    extra: Extra | None = None,
) -> Swaps:
    """The distance of every token to the nearest change of its experts, to first order:
    gap / ‖∇gap‖ in the dual norm, the gap between the logits of two experts. The gradient is that
    with respect to the image, through everything before the layer; experts chosen there stay
    chosen, as they do for small changes.

    A token on which no logit depends, as all but the class token in the last block, has swaps as
    others do, but the model does not jump there, so they are never the nearest of an image.

    Image bounds are not looked at, and neither are the places where a capacity drops other choices.
    Costs two forward passes, a backward pass, and E backward passes for each token and layer, all
    images at once; with ``pairs="next"`` one in place of E.

    Args:
        model: an nn.Module from images to logits, whose images do not influence each other. It is
            measured in eval mode and comes back as it was. One that routes nothing has no swaps. Of
            another callable it could not be told whether it does.
        x: (B, …) float32 or float64 images.
        norm: a registered norm with hyperplanes: "Linf", "L2", "L1".
        layers: the layers to look at, by name or number; None: all that run.
        tokens: the positions to look at, negative ones from the last; None: all.
        pairs: "all": every chosen expert against every other one, of which the nearest counts.
            "next": only the chosen expert with the smallest logit against the best of the others.
            That is cheap, and not always the nearest: a pair with a wider gap is nearer where its
            gap has a larger gradient. So distances of "next" are upper estimates of those of "all".
        batch_size: images at a time.
        extra: further inputs of the model, one entry an image, as ``Attack.run`` takes them; the
            mask of a ``VMoE`` is one. Padding has no swap.

    Returns:
        ``Swaps``.

    Raises:
        ValueError: a norm, layer, position, word or count outside the above; images that influence
            each other; a layer with Expert Choice (experts choose tokens), with groups of experts,
            with a router that does not tell its logits, or one that runs several times in a pass.
        TypeError: images or logits that are none; a model that is no nn.Module.
    """
    check_counts(1, batch_size=batch_size)
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {PAIRS}, got {pairs!r}")
    _check_tokens(tokens)
    _hyperplane_ball(norm)
    asked, x = asked_about(model, x, extra)
    names = layer_names(model, layers)

    with measured(asked, x):
        parts = [
            swaps_of(asked.part(places), x[places], norm, names, tokens=tokens, pairs=pairs)
            for places in chunks(len(x), batch_size)
        ]
    if layers is not None and parts:
        _check_ran(names, parts[0])
    return _joined(parts) if parts else _none_of(x, norm)


def _check_tokens(tokens: Any) -> None:
    if tokens is None:
        return
    is_sequence = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not is_sequence or not all(isinstance(token, int) for token in tokens):
        raise TypeError(f"tokens must be a sequence of whole numbers, or None, got {tokens!r}")
    if not tokens:
        raise ValueError(f"tokens must be at least one position, or None for all, got {tokens!r}")


def _hyperplane_ball(norm: str) -> type[HyperplaneBall]:
    ball = ball_of(norm)
    if not issubclass(ball, HyperplaneBall):
        raise ValueError(
            f"norm must be one of {norms_with(HyperplaneBall)}, whose dual norm is known, got "
            f"{norm!r}"
        )
    return ball


def swaps_of(
    asked: Asked,
    x: Tensor,
    norm: str,
    names: Sequence[str],
    *,
    tokens: Sequence[int] | None = None,
    pairs: str = "all",
) -> Swaps:
    """The swaps of one batch, of a model that is being measured. Arguments and errors are those of
    ``nearest_swaps``."""
    ball = _hyperplane_ball(norm)
    swaps = _none_of(x, norm)
    point = x.clone().requires_grad_()
    with deciding(asked.model, names) as seen, layer_outputs(asked.model, names) as outputs:
        logits = asked(point)
    weights = output_weights(logits, outputs)

    slope = torch.zeros_like(x, dtype=torch.float64)  # gradient of the nearest gap
    gap = torch.zeros_like(swaps.nearest)
    sites = routing_sites(asked.model) if names else {}
    for name in names:
        if not seen[name]:  # it did not run
            continue
        site = sites[name]
        choices_T = choices_of(one_pass(name, seen[name]), site.router)
        choices = Choices(*(by_image(values, len(x), members_of(site)) for values in choices_T))
        matters = token_matters(weights[name], len(x), site)
        columns = _columns(name, tokens, choices.real.shape[1])

        found = []
        for token in columns:
            here = Choices(*(values[:, token] for values in choices))
            swap = nearest_of_token(here, point, ball.dual_length, pairs)
            found.append(swap)
            nearer = matters[:, token] & (swap.distance < swaps.nearest)
            swaps.nearest = torch.where(nearer, swap.distance, swaps.nearest)
            swaps.layer = swaps.layer.masked_fill(nearer, len(swaps.layers))
            swaps.token = swaps.token.masked_fill(nearer, token)
            slope = where(nearer, swap.slope, slope)
            gap = torch.where(nearer, swap.gap.double(), gap)
        swaps.layers[name] = _layer(found, choices.real, matters, columns)

    everywhere = (float("-inf"), float("inf"))
    steps = ball.step_to_hyperplane(torch.zeros_like(slope), slope, gap, everywhere)
    swaps.steps = where(swaps.layer != NOWHERE, steps, torch.zeros_like(steps)).to(x.dtype)
    return swaps


def _columns(name: str, tokens: Sequence[int] | None, count: int) -> list[int]:
    """The positions to look at in a layer with ``count`` tokens an image."""
    if tokens is None:
        return list(range(count))
    for token in tokens:
        if not -count <= token < count:
            raise ValueError(
                f"tokens must be from {-count} to {count - 1} in {name!r}, got {token}"
            )
    return sorted({token % count for token in tokens})


def _layer(
    found: Sequence[TokenSwap], real: Tensor, matters: Tensor, columns: Sequence[int]
) -> LayerSwaps:
    """The swaps of one layer, of those at each position."""
    tokens = torch.tensor(columns, dtype=torch.int64, device=real.device)
    return LayerSwaps(
        distances=torch.stack([swap.distance for swap in found], 1),
        gaps=torch.stack([swap.gap for swap in found], 1),
        leaving=torch.stack([swap.leaving for swap in found], 1),
        coming=torch.stack([swap.coming for swap in found], 1),
        real=real[:, tokens],
        matters=matters[:, tokens],
        tokens=tokens,
    )


def _none_of(x: Tensor, norm: str) -> Swaps:
    """No swap of any image."""
    nowhere = torch.full((len(x),), NOWHERE, dtype=torch.int64, device=x.device)
    nearest = torch.full((len(x),), float("inf"), dtype=torch.float64, device=x.device)
    return Swaps(norm, {}, nearest, nowhere, nowhere.clone(), torch.zeros_like(x))


def _check_ran(names: Sequence[str], swaps: Swaps) -> None:
    for name in names:
        if name not in swaps.layers:
            raise ValueError(f"layers must run in a forward pass, got {name!r}, which does not")


def _joined(parts: Sequence[Swaps]) -> Swaps:
    """The swaps of several batches, one after another."""
    first, *_ = parts
    layers = {}
    for name, layer in first.layers.items():
        each = [part.layers[name]._asdict() for part in parts]
        joined = {field: torch.cat([values[field] for values in each]) for field in layer._fields}
        layers[name] = LayerSwaps(**(joined | {"tokens": layer.tokens}))

    return Swaps(
        norm=first.norm,
        layers=layers,
        nearest=torch.cat([part.nearest for part in parts]),
        layer=torch.cat([part.layer for part in parts]),
        token=torch.cat([part.token for part in parts]),
        steps=torch.cat([part.steps for part in parts]),
    )
