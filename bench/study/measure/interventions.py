"""The choice of experts: what other experts than the router's make of clean and of adversarial
images. The experiments of the paper (arXiv 2210.10253) on this are not released; these are the ones
that docs/paper.md defines."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement, numbers
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe import intervene
from ironmoe.moe.policies import (
    AllExperts,
    DropBest,
    Lowest,
    PermuteExperts,
    RandomExperts,
    RenormalizedGates,
    SameSum,
    UniformGates,
)
from ironmoe.moe.routing.routed_layers import Edit


def policies(experts: int, top_k: int, seed: int) -> dict[str, Edit]:
    """Name → policy, those that E and K allow. "…, same sum": the gates scaled to the sum that the
    router's had, so that what is left is the identity of the experts."""
    choices: dict[str, Edit] = {}
    if experts > top_k:
        choices["drop best"] = DropBest()
        choices["random"] = RandomExperts(seed)
        choices["lowest"] = Lowest()
        choices["permuted"] = PermuteExperts(seed=seed)
    if experts > 2 * top_k:
        choices["random of best"] = RandomExperts(seed, among=2 * top_k)
    same_sum: dict[str, Edit] = {
        f"{name}, same sum": SameSum(policy)
        for name, policy in choices.items()
        if name != "permuted"  # it keeps the gates
    }
    gates: dict[str, Edit] = {"uniform, same sum": SameSum(UniformGates())} if top_k > 1 else {}
    return (
        choices
        | same_sum
        | gates
        | {
            "renormalized": RenormalizedGates(),
            "average of all, same sum": SameSum(AllExperts()),
        }
    )


@measurement(
    "interventions",
    "accuracy, changed predictions and KL divergence under other choices of experts, on clean "
    "images and on those of PGD",
    settings=("radius", "clean_images", "routed_images", "steps", "seed"),
    passes=lambda budget: 8 * budget.clean_images + 30 * budget.routed_images,
    needs_experts=True,
)
def interventions(subject: Subject, budget: Budget) -> Outcome:
    """Accuracies "policy:clean" and "policy:attacked"; with ":changed", the share of predictions
    that the policy changes; with ":kl", the mean KL divergence (nats) of the model's probabilities
    from the steered ones. "none:clean", "none:attacked": without a policy. Per image: whether it
    is right."""
    sites = list(subject.layers.values())
    experts = min(site.num_experts for site in sites)
    on = {"clean": subject.sample(budget.clean_images)[0], "attacked": subject.adversarial(budget)}
    own = {name: _logits(subject, these, None, budget) for name, these in on.items()}

    outcome = Outcome()
    named: dict[str, Edit | None] = {"none": None}
    named |= policies(experts, _top_k(subject), budget.seed)
    for policy_name, policy in named.items():
        for name, these in on.items():
            steered = own[name] if policy is None else _logits(subject, these, policy, budget)
            right = (steered.argmax(1) == subject.labels[: len(these)]).double()
            key = f"{policy_name}:{name}"
            changed = (steered.argmax(1) != own[name].argmax(1)).double()
            outcome += Outcome(
                {
                    key: float(right.mean()),
                    f"{key}:changed": float(changed.mean()),
                    f"{key}:kl": float(_divergence(own[name], steered).mean()),
                },
                {key: numbers(right)},
            )
    return outcome


@torch.no_grad()
def _logits(subject: Subject, images: Tensor, policy: Edit | None, budget: Budget) -> Tensor:
    with nullcontext() if policy is None else intervene(subject.model, policy):
        return subject.logits(images, budget.batch_size)


def _divergence(own: Tensor, steered: Tensor) -> Tensor:
    """(N,) KL(own ‖ steered), in nats."""
    p, q = (logits.double().log_softmax(1) for logits in (own, steered))
    return (p.exp() * (p - q)).sum(1)


def _top_k(subject: Subject) -> int:
    """The most experts that a token takes in any layer."""
    return max(int(getattr(site.router, "top_k", 1)) for site in subject.layers.values())
