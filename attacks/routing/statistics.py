"""What an attack did to a model and to its routing, in the sums of the official V-MoE attack code
(arXiv 2210.10253)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ironmoe.attacks.engine.attacked_model import AttackedModel, Normalize
from ironmoe.attacks.engine.borrow import borrowed
from ironmoe.attacks.losses import Loss, get_loss
from ironmoe.attacks.routing.layers import members_of
from ironmoe.moe import LayerTrace, aux_loss_in_eval, collect_aux_loss, routing_sites, trace_routing
from ironmoe.moe.routing.metrics import READINGS, token_overlap

Number = TypeVar("Number", int, float)


@dataclass
class AttackStatistics:
    """Sums over images; batches are added with ``+``.

    images: how many images were counted
    changed: how many of them have another predicted class after the attack
    correct: (before, after) the attack, how many were classified right
    loss: (before, after) the attack, the sum of the losses of all of them
    overlap: reading → layer → (sum of IoU over tokens, number of tokens counted); ``token_overlap``
        says what the readings are
    """

    images: int = 0
    changed: int = 0
    correct: tuple[int, int] = (0, 0)
    loss: tuple[float, float] = (0.0, 0.0)
    overlap: dict[str, dict[str, tuple[float, int]]] = field(
        default_factory=lambda: {reading: {} for reading in READINGS}
    )

    def __add__(self, other: "AttackStatistics") -> "AttackStatistics":
        return AttackStatistics(
            images=self.images + other.images,
            changed=self.changed + other.changed,
            correct=_pair(a + b for a, b in zip(self.correct, other.correct, strict=True)),
            loss=_pair(a + b for a, b in zip(self.loss, other.loss, strict=True)),
            overlap={
                reading: _added(self.overlap[reading], other.overlap[reading])
                for reading in READINGS
            },
        )

    def routing_change(self, reading: str = "realised") -> dict[str, float]:
        """1 − mean IoU of each layer. "realised" is what the official code reports, its quirk
        included: a token that the capacity dropped before and after counts as changed."""
        if reading not in READINGS:
            raise ValueError(f"reading must be one of {READINGS}, got {reading!r}")
        return {
            layer: 1 - total / count if count else float("nan")
            for layer, (total, count) in self.overlap[reading].items()
        }


def attack_statistics(
    model: nn.Module,
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    *,
    loss: str | Loss = "ce",
    auxiliary_loss: bool = False,
    valid: Tensor | None = None,
    normalize: Normalize | None = None,
    logits_fn: Callable[[Any], Tensor] | None = None,
) -> AttackStatistics:
    """Compare a model on images and on their adversarial versions.

    Args:
        model: in any mode; it is evaluated in eval mode and handed back as it was.
        images, adversarial: (B, …), one batch: under a capacity the statistics depend on which
            images are together.
        labels: (B,) int64.
        loss: as in ``PGD``; auxiliary_loss: add the routers' auxiliary losses to every image's, as
            ``PGD.vmoe`` does.
        valid: (B,) bool; images that only pad the batch are False and not counted.
        normalize, logits_fn: as in ``Attack``; Hugging Face outputs are understood without.
    """
    if images.shape != adversarial.shape or len(labels) != len(images):
        raise ValueError(
            "images, adversarial and labels must be of the same B images, got "
            f"{tuple(images.shape)}, {tuple(adversarial.shape)} and {tuple(labels.shape)}"
        )
    counted = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid.bool()
    if counted.shape != labels.shape:
        raise ValueError(f"valid must have shape ({len(labels)},), got {tuple(counted.shape)}")

    attacked_model = AttackedModel(model, normalize, logits_fn)
    attacked_model.image_dtype = images.dtype
    loss_of = get_loss(loss)
    with borrowed(model), torch.no_grad(), aux_loss_in_eval(model):
        before, after = (
            _look(attacked_model, model, batch, labels, loss_of, auxiliary_loss)
            for batch in (images, adversarial)
        )

    members = {name: members_of(site) for name, site in routing_sites(model).items()}
    overlap = {
        reading: {
            name: _layer_overlap(layer, after.layers[name], reading, counted, members[name])
            for name, layer in before.layers.items()
            if layer.routings
        }
        for reading in READINGS
    }
    looks = (before, after)
    return AttackStatistics(
        images=int(counted.sum()),
        changed=int((counted & (before.prediction != after.prediction)).sum()),
        correct=_pair(int((counted & (look.prediction == labels)).sum()) for look in looks),
        loss=_pair(float(look.loss[counted].double().sum()) for look in looks),
        overlap=overlap,
    )


class _Look(NamedTuple):
    """What the model made of a batch: predictions and losses (B,), and the trace of each layer."""

    prediction: Tensor
    loss: Tensor
    layers: dict[str, LayerTrace]


def _look(
    attacked_model: AttackedModel,
    model: nn.Module,
    batch: Tensor,
    labels: Tensor,
    loss_of: Loss,
    auxiliary_loss: bool,
) -> _Look:
    """One traced pass; the auxiliary loss is of the whole batch, and is added to every image's."""
    with trace_routing(model) as trace:
        logits = attacked_model.logits(batch)
    auxiliary = collect_aux_loss(model).to(logits) if auxiliary_loss else 0.0
    return _Look(logits.argmax(1), loss_of(logits, labels) + auxiliary, trace.layers)


def _layer_overlap(
    clean: LayerTrace, adversarial: LayerTrace, reading: str, counted: Tensor, members: int
) -> tuple[float, int]:
    """(sum of IoU, number of tokens) over the tokens (T,) of the images that are ``counted``."""
    iou_T, counts_T = token_overlap(clean, adversarial, reading)

    # An ensemble's tokens come member after member.
    counted_M = counted.repeat(members)
    tokens = [len(routing.gates) for routing in clean.routings]  # of each run, with padding
    counted_T = torch.cat(
        [counted_M.repeat_interleave(count // max(len(counted_M), 1)) for count in tokens]
    )
    counts_T = counts_T & counted_T[clean.mask]
    return float(iou_T[counts_T].double().sum()), int(counts_T.sum())


def _added(
    one: dict[str, tuple[float, int]], other: dict[str, tuple[float, int]]
) -> dict[str, tuple[float, int]]:
    """Layer by layer; a batch in which a layer did not run adds nothing to it."""
    nothing = (0.0, 0)
    return {
        layer: (
            one.get(layer, nothing)[0] + other.get(layer, nothing)[0],
            one.get(layer, nothing)[1] + other.get(layer, nothing)[1],
        )
        for layer in one | other
    }


def _pair(values: Iterable[Number]) -> tuple[Number, Number]:
    before, after = values
    return before, after
