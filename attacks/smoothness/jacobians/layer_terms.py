"""What the derivative of each routed layer is made of, and how much depends on its choices.

Inside a cell, where no token changes an expert, a layer y = Σ g f(x) has the derivative
Σ g ∂f + Σ f ∂gᵀ: an expert term, in which gates are constants, and a gate term, in which the
outputs of experts are. At the border of a cell it jumps by g (f_a − f_b). So experts that differ on
a token make the last two large (arXiv 2210.10253).

Shape suffixes: T tokens, S of them, D their width, K choices, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.extra import Extra
from ironmoe.attacks.methods.parts.counts import check_counts
from ironmoe.attacks.routing.layers import members_of
from ironmoe.attacks.smoothness.asking import asked_about, chunks
from ironmoe.attacks.smoothness.jacobians.layer_tokens import LayerTokens, block_of
from ironmoe.attacks.smoothness.layers import layer_names
from ironmoe.attacks.smoothness.separate import measured
from ironmoe.kernels import Routing
from ironmoe.moe.metrics import boundary_mass, expert_outputs, swap_jump
from ironmoe.moe.routing.ranks import by_rank, ranking
from ironmoe.moe.routing.routed_layers import Decision, RoutedLayer, routing_sites
from ironmoe.moe.routing.trace import LayerTrace, trace_routing


class Boundary(NamedTuple):
    """How many tokens are near another choice. The margin of a token is its K-th largest logit
    minus the next; ∞ if K = E.

    widths: (W,) float64, in units of the logits
    mass:   (W,) float64, the share of tokens whose margin is at most the width
    slope:  mass per unit of width as the width goes to 0: (k − 1) / (T m), m the k-th smallest
        margin and k = ⌈√T⌉ + 1. Its relative error is about 1 / √(k − 2)
    """

    widths: Tensor
    mass: Tensor
    slope: float


@dataclass(repr=False)
class LayerTerms:
    """One layer, at T tokens that it got, and in detail at S of them, drawn at random. Tensors are
    float64 but ``tokens``.

    tokens: (S,) int64, which tokens, among all real ones of all images in the order in which the
        layer got them
    whole_frobenius, whole_spectral: (S,) norms of the Jacobian of the layer, token in, token out,
        with the shared expert and without the residual path
    experts_frobenius, experts_spectral: (S,) of its expert term: the gates are constants
    gates_frobenius, gates_spectral: (S,) of its gate term: the rest, in which what experts give is
        constant
    gate_sums: (T,) the sum of the gates that were carried out
    chosen_distance, chosen_relative: (S,) the distance ‖f_a − f_b‖ of the outputs of the token's K
        experts, mean over pairs; relative: over ½ (‖f_a‖ + ‖f_b‖). NaN if it has fewer than two
    next_distance, next_relative: (S,) the same of its K-th expert and the best one that it has not;
        NaN if there is none, or the router does not tell its logits
    jumps: (S,) gate_K ‖f_K − f_next‖, how far the output jumps when these two change places; 0 if
        K = E, NaN without logits
    boundary: None without logits
    """

    tokens: Tensor
    whole_frobenius: Tensor
    whole_spectral: Tensor
    experts_frobenius: Tensor
    experts_spectral: Tensor
    gates_frobenius: Tensor
    gates_spectral: Tensor
    gate_sums: Tensor
    chosen_distance: Tensor
    chosen_relative: Tensor
    next_distance: Tensor
    next_relative: Tensor
    jumps: Tensor
    boundary: Boundary | None

    def __repr__(self) -> str:
        """What to read first, in place of all the tensors."""
        means = ", ".join(
            f"{name} {float(values.mean()):.3g}"
            for name, values in (
                ("‖J‖_F", self.whole_frobenius),
                ("experts", self.experts_frobenius),
                ("gates", self.gates_frobenius),
            )
        )
        return f"LayerTerms({len(self.tokens)} of {len(self.gate_sums)} tokens, means: {means})"


def layer_terms(
    model: Any,
    x: Tensor,
    *,
    layers: Sequence[str | int] | None = None,
    tokens: int | None = 64,
    seed: int = 0,
    widths: Sequence[float] = (0.01, 0.1, 1.0),
    batch_size: int = 64,
    extra: Extra | None = None,
) -> dict[str, LayerTerms]:
    """The derivative of each routed layer at the tokens of some images, in an expert term and a
    gate term that add up to it, and how much experts differ there.

    A layer is run again on the drawn tokens, with the experts that they had, drops included: 2 D
    backward passes of the layer for all tokens together. Memory: 3 · ``tokens`` · D² numbers. Of a
    Hugging Face model the layer is the block around router and experts.

    Args:
        model: an nn.Module, as in ``jacobian``. One that routes nothing has no terms: the result
            is {}.
        x: (B, …) float32 or float64 images.
        layers: by name or number; None: all that run.
        tokens: how many to draw; in an ensemble of each member, the same of all. None: all.
        seed: of the draw. The same tokens are drawn in all layers with as many.
        widths: of ``Boundary``, at least 0.
        batch_size: images at a time.
        extra: further inputs of the model, one entry an image; padding is no token.

    Returns:
        name → ``LayerTerms``, in the model's order.

    Raises:
        ValueError: images that influence each other; a layer that is not there, or does not run; a
            router that decides about a token by the others, as Expert Choice does; a Hugging Face
            block that is not understood; numbers outside the above.
        TypeError: images or logits that are none; a model that is no nn.Module.
    """
    check_counts(1, batch_size=batch_size, **({} if tokens is None else {"tokens": tokens}))
    if not all(0 <= width < math.inf for width in widths):
        raise ValueError(f"widths must be finite and at least 0, got {tuple(widths)}")
    asked, x = asked_about(model, x, extra)
    names = layer_names(model, layers)
    if not names:
        return {}

    with measured(asked, x):
        sites = routing_sites(model)
        with trace_routing(model, keep_inputs=True) as trace, torch.no_grad():
            for places in chunks(len(x), batch_size):
                asked.part(places)(x[places])

        found = {}
        for name in names:
            layer = trace.layers[name]
            if layer.routings:
                drawn = _drawn(layer, members_of(sites[name]), tokens, seed)
                found[name] = _terms(model, sites[name], layer, drawn, widths)
            elif layers is not None and len(x):
                raise ValueError(f"layers must run in a forward pass, got {name!r}, which does not")
    return found


def _drawn(layer: LayerTrace, members: int, tokens: int | None, seed: int) -> Tensor:
    """(S,) int64 tokens of a trace, member after member."""
    counts = [len(routing.experts) for routing in layer.routings]
    if layer.all_masks and any(mask is not None for mask in layer.all_masks):
        masks = layer.mask.split(counts)
        counts = [int(mask.sum()) for mask in masks]
    device = layer.routings[0].experts.device
    numbers = torch.arange(sum(counts), device=device).split(counts)
    by_member_MN = torch.cat([part.view(members, -1) for part in numbers], 1)

    total = by_member_MN.shape[1]
    if tokens is None or tokens >= total:
        return by_member_MN.flatten()
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(total, generator=generator)[:tokens].sort().values
    return by_member_MN[:, some.to(device)].flatten()


def _terms(
    model: Any, site: RoutedLayer, layer: LayerTrace, drawn: Tensor, widths: Sequence[float]
) -> LayerTerms:
    known = all(logits is not None for logits in layer.all_logits)
    intended = Routing(*(field[drawn] for field in layer.intended))
    carried_out = Routing(layer.gates[drawn], layer.experts[drawn])
    at = LayerTokens(
        site,
        block_of(model, site),
        layer.inputs[drawn],
        intended,
        carried_out,
        layer.logits[drawn] if known else None,
    )
    whole = at.jacobian(constant_gates=False).double()
    experts = at.jacobian(constant_gates=True).double()
    gates = whole - experts

    norms: dict[str, Any] = {}
    for name, term in (("whole", whole), ("experts", experts), ("gates", gates)):
        norms[f"{name}_frobenius"], norms[f"{name}_spectral"] = _norms(term)
    return LayerTerms(
        tokens=drawn,
        gate_sums=layer.gates.double().sum(1),
        jumps=_jumps(at) if known else torch.full_like(norms["whole_frobenius"], math.nan),
        boundary=_boundary(layer, widths) if known else None,
        **norms,
        **_distances(at),
    )


def _norms(matrices_SDD: Tensor) -> tuple[Tensor, Tensor]:
    """(Frobenius norms, spectral norms), both (S,)."""
    if not len(matrices_SDD):
        nothing = matrices_SDD.new_zeros(0)
        return nothing, nothing
    return matrices_SDD.flatten(1).norm(dim=1), torch.linalg.matrix_norm(matrices_SDD, 2)


def _distances(at: LayerTokens) -> dict[str, Any]:
    """The distances of ``LayerTerms``."""
    num_experts = at.site.num_experts
    chosen = by_rank(at.intended, num_experts)
    experts_SR = chosen.experts.long()
    if at.logits is not None:
        decision = Decision(at.site.name, chosen, at.logits, at.inputs, num_experts, None)
        experts_SR = ranking(decision)

    # one place more than experts, for places without one
    outputs_SED = expert_outputs(at.site.module, at.inputs).double()
    outputs_SED = torch.nn.functional.pad(outputs_SED, (0, 0, 0, 1), value=math.nan)
    by_rank_SRD = outputs_SED.gather(1, experts_SR[..., None].expand(-1, -1, outputs_SED.shape[2]))

    count_S1 = (chosen.experts < num_experts).sum(1, keepdim=True)
    top_k = chosen.experts.shape[1]
    pairs = [
        torch.stack(_apart(by_rank_SRD[:, a], by_rank_SRD[:, b]))
        for a in range(top_k)
        for b in range(a + 1, top_k)
    ]
    nothing = torch.full((2, len(by_rank_SRD)), math.nan).to(by_rank_SRD)
    chosen_distance, chosen_relative = torch.stack(pairs).nanmean(0) if pairs else nothing

    padded_SRD = torch.nn.functional.pad(by_rank_SRD, (0, 0, 0, 1), value=math.nan)
    last, following = (
        padded_SRD.gather(1, at_S1[..., None].expand(-1, -1, padded_SRD.shape[2]))[:, 0]
        for at_S1 in ((count_S1 - 1).clamp_min(0), count_S1)
    )
    next_distance, next_relative = _apart(last, following)
    return {
        "chosen_distance": chosen_distance,
        "chosen_relative": chosen_relative,
        "next_distance": next_distance,
        "next_relative": next_relative,
    }


def _apart(a_SD: Tensor, b_SD: Tensor) -> tuple[Tensor, Tensor]:
    """(distance, distance over the mean length), both (S,)."""
    distance = (a_SD - b_SD).norm(dim=1)
    length = (a_SD.norm(dim=1) + b_SD.norm(dim=1)) / 2
    return distance, torch.where(length == 0, 0, distance / length)


def _jumps(at: LayerTokens) -> Tensor:
    """(S,) by ``swap_jump``, of the drawn tokens alone."""
    drawn = LayerTrace(
        at.site.num_experts,
        routings=[at.carried_out],
        all_intended=[at.intended],
        all_logits=[at.logits],
        all_inputs=[at.inputs],
    )
    return swap_jump(at.site.module, drawn).double()


def _boundary(layer: LayerTrace, widths: Sequence[float]) -> Boundary:
    mass = [boundary_mass(layer, width) for width in widths]
    both = torch.tensor([list(widths), mass], dtype=torch.float64, device=layer.logits.device)
    return Boundary(both[0], both[1], _slope_at_0(layer.margins))


def _slope_at_0(margins_T: Tensor) -> float:
    """The density of the margins at 0, by the nearest ones: of margins that are even near 0 its
    mean is right."""
    total = len(margins_T)
    nearest = min(math.isqrt(max(total - 1, 0)) + 2, total)
    if nearest < 2:
        return math.nan
    width = float(margins_T.double().kthvalue(nearest).values)
    return (nearest - 1) / (total * width) if width > 0 else math.inf
