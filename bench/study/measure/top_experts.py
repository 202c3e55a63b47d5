"""How much the experts that a token likes best differ, and what its layer's derivative is made
of."""

from functools import partial

import torch
from torch import Tensor

from ironmoe.attacks.smoothness.jacobians.layer_terms import layer_terms
from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers, part
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe import LayerTrace, trace_routing
from ironmoe.moe.metrics import expert_outputs
from ironmoe.moe.routing.ranks import by_rank

TOKENS = 32  # at which layers are derived
TINY = 1e-300  # experts that give 0 are equal


@measurement(
    "top experts",
    "the relative distance of the outputs of the two experts that a token likes best; of each "
    "layer the parts of its derivative that go through experts and through gates",
    settings=("local_images", "seed"),
    passes=lambda budget: 10 * budget.local_images,
    needs_experts=True,
    needs_whole_weights=True,
)
def top_experts(subject: Subject, budget: Budget) -> Outcome:
    """Means over tokens and layers of the following; with ":layer" those of each layer.

    "top_distance": ‖f_a − f_b‖ / ½ (‖f_a‖ + ‖f_b‖), of the best two experts of a token: 0 for equal
    ones, √2 for orthogonal ones of one length; "next_distance": the same of its K-th and its next
    expert, between which it swaps; "expert_term", "gate_term": Frobenius norms of the parts of a
    layer's Jacobian over that of the whole; "boundary": the share of tokens at the border of a
    choice, per unit of the logits. Of each image "top_distance".
    """
    images, _ = subject.sample(budget.local_images)
    with torch.no_grad(), trace_routing(subject.model, keep_inputs=True) as trace:
        subject.model(images)
    of_images = torch.stack(
        [
            _distance(subject, name, layer).view(len(images), -1).nanmean(1)
            for name, layer in trace.layers.items()
        ]
    ).nanmean(0)
    outcome = Outcome(
        {"top_distance": float(of_images.nanmean())}, {"top_distance": numbers(of_images)}
    )
    return outcome + part("terms of layers", partial(_terms, subject, budget))


def _terms(subject: Subject, budget: Budget) -> Outcome:
    images, _ = subject.sample(budget.local_images)
    values: dict[str, float] = {}
    terms = layer_terms(subject.model, images, tokens=TOKENS, seed=budget.seed)
    for name, layer in terms.items():
        of_layer = {
            "expert_term": layer.experts_frobenius / layer.whole_frobenius,
            "gate_term": layer.gates_frobenius / layer.whole_frobenius,
            "next_distance": layer.next_relative,
        }
        means = {what: float(shares.nanmean()) for what, shares in of_layer.items()}
        means["boundary"] = torch.nan if layer.boundary is None else layer.boundary.slope
        for what, mean in means.items():
            values[f"{what}:{name}"] = mean
            values[what] = values.get(what, 0.0) + mean / len(terms)
    return Outcome(values)


@torch.no_grad()
def _distance(subject: Subject, name: str, layer: LayerTrace) -> Tensor:
    """(T,) relative distance of the outputs of each token's best two experts; NaN of a token that
    has fewer."""
    if layer.num_experts < 2:
        return torch.full((len(layer.intended.gates),), torch.nan, dtype=torch.float64)

    outputs_TED = expert_outputs(subject.layers[name].module, layer.inputs).double()
    best_T2 = _best_two(layer)
    nobody_T = (best_T2 == layer.num_experts).any(1)
    best_T2 = best_T2.clamp_max(layer.num_experts - 1)
    pair_T2D = outputs_TED.gather(1, best_T2[..., None].expand(-1, -1, outputs_TED.shape[-1]))
    first_TD, second_TD = pair_T2D.unbind(1)
    scale_T = (first_TD.norm(dim=1) + second_TD.norm(dim=1)) / 2
    distance_T = (first_TD - second_TD).norm(dim=1)
    return (distance_T / scale_T.clamp_min(TINY)).masked_fill(nobody_T, torch.nan)


def _best_two(layer: LayerTrace) -> Tensor:
    """(T, 2) the experts with the largest gates; with K = 1 the chosen one and, of the others, that
    with the largest logit."""
    _, experts_TK = by_rank(layer.intended, layer.num_experts)
    experts_TK = experts_TK.long()
    if experts_TK.shape[1] > 1:
        return experts_TK[:, :2]
    others_TE = layer.logits.scatter(1, experts_TK, float("-inf"))
    return torch.cat([experts_TK, others_TE.argmax(1, keepdim=True)], dim=1)
