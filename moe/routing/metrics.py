"""Numbers that say what routing does: how much it changed, how even it is, how near a change is,
and how much a change would matter.

Shape suffixes: B images, N tokens of an image, T tokens, K choices, E experts, D width of a token,
R rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ironmoe.kernels import Dispatch, Routing, expert_mlp
from ironmoe.moe.adapters.huggingface_routing import is_experts
from ironmoe.moe.layers.expert_linear import TwoLayers, run_experts
from ironmoe.moe.layers.moe import MoE
from ironmoe.moe.routing.ranks import by_rank
from ironmoe.moe.routing.trace import LayerTrace

READINGS = ("realised", "intended", "kept")
"""What may count as the experts of a token; ``token_overlap`` explains each."""


def routing_iou(experts_a_TK: Tensor, experts_b_TK: Tensor, num_experts: int) -> Tensor:
    """(T,) |A ∩ B| / |A ∪ B| of the sets of experts each token uses in two passes; dropped choices
    (E) are in no set.

    0 where both sets are empty, as in the official V-MoE attack code.
    """
    used_a_TE, used_b_TE = _used(experts_a_TK, num_experts), _used(experts_b_TK, num_experts)
    return (used_a_TE & used_b_TE).sum(1) / (used_a_TE | used_b_TE).sum(1).clamp_min(1)


def token_overlap(
    clean: LayerTrace, adversarial: LayerTrace, reading: str = "realised"
) -> tuple[Tensor, Tensor]:
    """(IoU (T,), whether the reading counts the token (T,) bool) of the experts each token uses in
    two traces of the same images.

    Readings, all after the official attack code of arXiv 2210.10253, where an expert is used if its
    combine weight is above 0:

    - "realised": what was carried out. A token that the capacity dropped in both passes has two
      empty sets; the official code gives it IoU 0, so that it counts as changed although nothing
      changed. With drops this reading is above 0 with no attack at all.
    - "intended": what the router chose before any drop, which is what the official code sees with
      its "indices" dispatcher.
    - "kept": realised, tokens with two empty sets left out.
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {READINGS}, got {reading!r}")
    if clean.num_experts != adversarial.num_experts or len(clean.gates) != len(adversarial.gates):
        raise ValueError(
            f"the traces must be of one layer and the same tokens, got {clean.num_experts} and "
            f"{adversarial.num_experts} experts, {len(clean.gates)} and "
            f"{len(adversarial.gates)} tokens"
        )
    num_experts = clean.num_experts
    chosen = []
    for layer in (clean, adversarial):
        gates_TK, experts_TK = (
            layer.intended if reading == "intended" else Routing(layer.gates, layer.experts)
        )
        chosen.append(experts_TK.masked_fill(~(gates_TK > 0), num_experts))
    iou_T = routing_iou(chosen[0], chosen[1], num_experts)
    if reading != "kept":
        return iou_T, torch.ones_like(iou_T, dtype=torch.bool)
    return iou_T, ((chosen[0] < num_experts).any(1) | (chosen[1] < num_experts).any(1))


def routing_change(clean: LayerTrace, adversarial: LayerTrace, reading: str = "realised") -> float:
    """1 − mean IoU over tokens: the share of the experts in use that changed, from 0 to 1. Readings
    as in ``token_overlap``; NaN where no token counts."""
    iou_T, counts_T = token_overlap(clean, adversarial, reading)
    return 1 - iou_T[counts_T].double().mean().item()


def image_overlap(
    clean: LayerTrace, adversarial: LayerTrace, images: int, reading: str = "realised"
) -> Tensor:
    """(B,) float64, each image's mean IoU over its tokens; NaN for an image of which no token
    counts.

    The official attack code reports the sum of it over images, ``sum_iou``, by the reading
    "realised" ("intended" with its "indices" dispatcher); 1 − sum / B is its routing change.
    Readings as in ``token_overlap``.

    Args:
        images: B; the traces hold B images of equally many tokens, padding counted, one after
            another. M · B for an ensemble of M members.
    """
    iou_T, counts_T = token_overlap(clean, adversarial, reading)
    real_T = clean.mask
    if images < 1 or len(real_T) % images:
        raise ValueError(
            f"images must be at least 1 and divide the {len(real_T)} tokens, got {images}"
        )
    # Padding counts nowhere: it only says where the tokens of the next image begin.
    all_iou_T = iou_T.new_zeros(len(real_T), dtype=torch.float64)
    all_iou_T[real_T] = iou_T.double()
    all_counts_T = torch.zeros_like(real_T)
    all_counts_T[real_T] = counts_T

    shape = (images, len(real_T) // images)
    iou_BN, counts_BN = all_iou_T.view(shape), all_counts_T.view(shape)
    return (iou_BN * counts_BN).sum(1) / counts_BN.sum(1)


def imbalance(load_E: Tensor) -> float:
    """The busiest expert's load over the mean load: 1 if all are equal, E if one has everything.
    ``load_E`` as ``LayerTrace.load()``."""
    return (load_E.max() / load_E.mean()).item()


def load_variation(load_E: Tensor) -> float:
    """Coefficient of variation of the load, population standard deviation over mean: 0 if all are
    equal, √(E − 1) if one has everything."""
    return (load_E.std(correction=0) / load_E.mean()).item()


def entropy(shares_E: Tensor) -> Tensor:
    """−Σ p log p over the last axis, in nats: of the load (log E if even) or of each token's
    softmax (0 if sure)."""
    return torch.special.entr(shares_E).sum(-1)


def routing_entropy(layer: LayerTrace, of: str = "logits") -> tuple[float, float]:
    """(entropy of the mean token's distribution over experts, mean entropy of the tokens'
    distributions), in nats.

    Log E and 0 are the ideal: experts evenly used by tokens that are sure. The difference is the
    mutual information between token and expert; it is 0 if every token is routed alike.

    Args:
        of: "logits": the softmax over all experts; "gates": the gates carried out, divided by their
            sum, without tokens that have none.
    """
    if of == "logits":
        shares_TE = layer.logits.double().softmax(-1)
    elif of == "gates":
        gates_TK = layer.gates.double()
        nothing_TE = gates_TK.new_zeros(len(gates_TK), layer.num_experts + 1)
        # the last column collects dropped choices
        gates_TE = nothing_TE.scatter_add(1, layer.experts.long(), gates_TK)[:, :-1]
        sum_T = gates_TE.sum(1)
        shares_TE = gates_TE[sum_T > 0] / sum_T[sum_T > 0, None]
    else:
        raise ValueError(f'of must be "logits" or "gates", got {of!r}')
    return entropy(shares_TE.mean(0)).item(), entropy(shares_TE).mean().item()


def dormant_experts(layer: LayerTrace, share: float = 0.0) -> list[int]:
    """Experts with at most this share of the kept choices; by default those that nobody used."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    return (layer.load() <= share).nonzero().flatten().tolist()


def margin_histogram(layer: LayerTrace, edges: Tensor) -> Tensor:
    """(bins,) how many tokens have a margin in [edges[i], edges[i + 1]), the last bin with its end.
    ``edges`` ascend."""
    if edges.ndim != 1 or len(edges) < 2 or not bool((edges.diff() > 0).all()):
        raise ValueError(f"edges must be at least two ascending numbers, got {edges.tolist()}")
    margins_T = layer.margins.cpu().double()
    return torch.histogram(margins_T, edges.cpu().double()).hist.long()


def boundary_mass(layer: LayerTrace, width: float) -> float:
    """Share of tokens whose margin is at most ``width``, in units of the logits: those that a small
    change sends elsewhere."""
    return (layer.margins <= width).double().mean().item()


@torch.no_grad()
def expert_outputs(module: nn.Module, x_TD: Tensor) -> Tensor:
    """(T, E, D) what each expert makes of each token, with weight 1; without shared experts,
    whatever block of ``intervene`` runs.

    Args:
        module: an ``MoE``, or the Experts module of a Hugging Face model:
            ``routing_sites(model)[name].module``.
        x_TD: its inputs, as ``trace_routing(model, keep_inputs=True)`` records them.
    """
    if not isinstance(module, MoE) and not is_experts(module):
        raise TypeError(
            "module must be an MoE or the Experts of a Hugging Face model, got "
            f"{type(module).__name__}"
        )
    if x_TD.ndim != 2:
        raise ValueError(f"x must have shape (tokens, features), got {tuple(x_TD.shape)}")
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    rows_RD = x_TD.repeat_interleave(num_experts, 0)
    experts_R1 = torch.arange(num_experts, device=x_TD.device).repeat(len(x_TD))[:, None]
    gates_R1 = torch.ones(
        len(rows_RD), 1, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device
    )
    if isinstance(module, MoE):
        routing = Routing(gates_R1, experts_R1.to(torch.int32))
        options: dict[str, Any] = {"activation": module.activation, "precision": module.precision}

        def product_of(routing: Routing, _: Dispatch | None) -> TwoLayers:
            return lambda x, w_in, b_in, w_out, b_out: expert_mlp(
                x, w_in, w_out, routing, b_in=b_in, b_out=b_out, **options
            )

        out_RD = run_experts(module, rows_RD, routing, None, product_of)
    else:
        # forward, because module(…) would run the hooks of a trace or an intervention
        out_RD = module.forward(rows_RD, experts_R1, gates_R1.to(x_TD.dtype))
    return out_RD.unflatten(0, (len(x_TD), num_experts))


def expert_distance(outputs_TED: Tensor) -> Tensor:
    """(E, E) mean over tokens of ‖f_a − f_b‖ / (½ (‖f_a‖ + ‖f_b‖)): 0 for equal experts, √2 for
    orthogonal ones of one length, 2 for opposite ones. That the best experts of a token differ is
    what makes an MoE fragile in arXiv 2210.10253."""
    distance_TEE = torch.cdist(
        outputs_TED, outputs_TED, compute_mode="donot_use_mm_for_euclid_dist"
    )
    length_TE = outputs_TED.norm(dim=-1)
    scale_TEE = (length_TE[:, :, None] + length_TE[:, None, :]) / 2
    return (distance_TEE / scale_TEE.clamp_min(torch.finfo(distance_TEE.dtype).tiny)).mean(0)


def expert_cosine(outputs_TED: Tensor) -> Tensor:
    """(E, E) mean over tokens of the cosine between the outputs of two experts on the same
    token."""
    unit_TED = nn.functional.normalize(outputs_TED, dim=-1)
    return (unit_TED @ unit_TED.transpose(1, 2)).mean(0)


@torch.no_grad()
def swap_jump(module: nn.Module, layer: LayerTrace) -> Tensor:
    """(T,) gate_K · ‖f_K − f_{K+1}‖: how far the layer's output jumps when the K-th expert of a
    token, that of the smallest gate, and the best of the others by logits change places.

    An MoE is not Lipschitz there; exact on the boundary, where both weigh the same. 0 if K = E, and
    for tokens without an expert.

    Args:
        module: as for ``expert_outputs``; layer: its trace, recorded with ``keep_inputs=True``.
    """
    num_experts = layer.num_experts
    gates_TK, experts_TK = by_rank(layer.intended, num_experts)
    if experts_TK.shape[1] >= num_experts:
        return gates_TK.new_zeros(len(gates_TK))
    last_T1 = ((experts_TK < num_experts).sum(1, keepdim=True) - 1).clamp_min(0)
    chosen_TE = _used(experts_TK, num_experts)
    best_T1, next_T1 = layer.logits.masked_fill(chosen_TE, float("-inf")).max(1, keepdim=True)
    worst_T1 = experts_TK.long().gather(1, last_T1).clamp_max(num_experts - 1)
    pair_T2 = torch.cat([worst_T1, next_T1], dim=1)

    outputs_TED = expert_outputs(module, layer.inputs)
    pair_T2D = pair_T2[..., None].expand(-1, -1, outputs_TED.shape[-1])
    first_TD, second_TD = outputs_TED.gather(1, pair_T2D).unbind(1)
    # −∞: there is no other expert (those left belong to other members), and so no jump
    gate_T = gates_TK.gather(1, last_T1).masked_fill(best_T1.isneginf(), 0).squeeze(1)
    return gate_T * (first_TD - second_TD).norm(dim=-1)


def _used(experts_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E) bool: whether the token has the expert."""
    used_TE = torch.zeros(
        len(experts_TK), num_experts + 1, dtype=torch.bool, device=experts_TK.device
    )
    return used_TE.scatter_(1, experts_TK.long(), True)[:, :num_experts]
