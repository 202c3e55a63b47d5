"""What an attack did to a model and to its routing, in the sums of the official V-MoE attack code
(arXiv 2210.10253)."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

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

    images: how many; changed: whose predicted class changed
    correct, loss: (before, after) the attack: how many were right, and the sum of their losses
    overlap: reading → layer → (sum of IoU over tokens, tokens counted); the readings are those of
        ``token_overlap``
    """

    images: int = 0
    changed: int = 0
    correct: tuple[int, int] = (0, 0)
    loss: tuple[float, float] = (0.0, 0.0)
    overlap: dict[str, dict[str, tuple[float, int]]] = field(
        default_factory=lambda: {reading: {} for reading in READINGS}
    )

    def __add__(self, other: "AttackStatistics") -> "AttackStatistics":
        overlap = {
            reading: {
                layer: (
                    sum(s.overlap[reading].get(layer, (0.0, 0))[0] for s in (self, other)),
                    sum(s.overlap[reading].get(layer, (0.0, 0))[1] for s in (self, other)),
                )
                for layer in self.overlap[reading] | other.overlap[reading]
            }
            for reading in READINGS
        }
        correct = _pair(a + b for a, b in zip(self.correct, other.correct, strict=True))
        loss = _pair(a + b for a, b in zip(self.loss, other.loss, strict=True))
        return AttackStatistics(
            self.images + other.images, self.changed + other.changed, correct, loss, overlap
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
            f"{tuple(images.shape)}, "
            f"{tuple(adversarial.shape)} and {tuple(labels.shape)}"
        )
    counted = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid.bool()
    if counted.shape != labels.shape:
        raise ValueError(f"valid must have shape ({len(labels)},), got {tuple(counted.shape)}")
    attacked_model = AttackedModel(model, normalize, logits_fn)
    attacked_model.image_dtype = images.dtype
    members = {name: members_of(site) for name, site in routing_sites(model).items()}
    predictions: list[Tensor] = []
    losses: list[Tensor] = []
    traces: list[dict[str, LayerTrace]] = []
    with borrowed(model), torch.no_grad(), aux_loss_in_eval(model):
        for batch in (images, adversarial):
            with trace_routing(model) as trace:
                logits = attacked_model.logits(batch)
            predictions.append(logits.argmax(1))
            auxiliary = collect_aux_loss(model).to(logits) if auxiliary_loss else 0.0
            losses.append(get_loss(loss)(logits, labels) + auxiliary)
            traces.append(trace.layers)
    overlap = {
        reading: {
            name: _layer_overlap(traces[0][name], traces[1][name], reading, counted, members[name])
            for name in traces[0]
            if traces[0][name].routings
        }
        for reading in READINGS
    }
    return AttackStatistics(
        images=int(counted.sum()),
        changed=int((counted & (predictions[0] != predictions[1])).sum()),
        correct=_pair(int((counted & (prediction == labels)).sum()) for prediction in predictions),
        loss=_pair(float(value[counted].double().sum()) for value in losses),
        overlap=overlap,
    )


def _layer_overlap(
    clean: LayerTrace, adversarial: LayerTrace, reading: str, counted: Tensor, members: int
) -> tuple[float, int]:
    iou_T, counts_T = token_overlap(clean, adversarial, reading)
    counted_M = counted.repeat(members)  # an ensemble's tokens come member after member
    tokens = [len(routing.gates) for routing in clean.routings]  # of each run of the layer
    counts_T = counts_T & torch.cat(
        [counted_M.repeat_interleave(count // max(len(counted_M), 1)) for count in tokens]
    )
    return float(iou_T[counts_T].double().sum()), int(counts_T.sum())


def _pair(values: Iterable[Number]) -> tuple[Number, Number]:
    before, after = values
    return before, after
