"""The choice of experts: what other experts than the router's make of clean and of adversarial
images. The experiments of the paper (arXiv 2210.10253) on this are not released; these are the ones
that docs/paper.md defines."""

from contextlib import nullcontext

import torch
from torch import Tensor

from ironmoe.bench.study.measure.budget import Budget
from ironmoe.bench.study.measure.measurement import Outcome, measurement
from ironmoe.bench.study.measure.steered import steered
from ironmoe.bench.study.measure.subject import Subject
from ironmoe.moe import intervene
from ironmoe.moe.distributed import RanksDisagreeError
from ironmoe.moe.policies import (
    AllExperts,
    DropBest,
    DropRank,
    Lowest,
    OneExpert,
    PermuteExperts,
    RandomExperts,
    RenormalizedGates,
    SameSum,
    UniformGates,
    UseRanks,
)
from ironmoe.moe.routing.routed_layers import Edit


def policies(experts: int, top_k: int, seed: int) -> dict[str, Edit]:
    """Name → policy, those that E and K allow. "…, same sum": the gates scaled to the sum that the
    router's had, so that what is left is the identity of the experts."""
    others: dict[str, Edit] = {"one expert": OneExpert(), "average of all": AllExperts()}
    if experts > top_k:
        others["drop best"] = DropBest()
        others["random"] = RandomExperts(seed)
        others["lowest"] = Lowest()
    if experts >= top_k + 2:
        others["ranks 3 to K + 2"] = UseRanks(3)
    if experts > 2 * top_k:
        others["random of best"] = RandomExperts(seed, among=2 * top_k)
    if top_k > 1:
        others["uniform"] = UniformGates()
        others["without rank 1"] = DropRank(1)
        others["without rank 2"] = DropRank(2)
    same_sum: dict[str, Edit] = {
        f"{name}, same sum": SameSum(policy) for name, policy in others.items()
    }
    # these two keep the sum, or are about it
    return (
        others
        | same_sum
        | {"permuted": PermuteExperts(seed=seed), "renormalized": RenormalizedGates()}
    )


@measurement(
    "interventions",
    "accuracy, changed predictions and KL divergence under other choices of experts, on clean "
    "images and on those of PGD",
    settings=("radius", "clean_images", "routed_images", "steps", "seed"),
    passes=lambda budget: 10 * budget.clean_images + 30 * budget.routed_images,
    needs_experts=True,
    version=2,
)
def interventions(subject: Subject, budget: Budget) -> Outcome:
    """ "policy:clean" and "policy:attacked", as ``steered`` has them; "none:clean" and
    "none:attacked" without a policy."""
    sites = list(subject.layers.values())
    experts = min(site.num_experts for site in sites)
    on = {"clean": subject.sample(budget.clean_images)[0], "attacked": subject.adversarial(budget)}
    own = {name: _logits(subject, these, None, budget) for name, these in on.items()}

    outcome = Outcome()
    refused: dict[str, list[str]] = {}
    named: dict[str, Edit | None] = {"none": None}
    named |= policies(experts, _top_k(subject), budget.seed)
    for policy_name, policy in named.items():
        try:
            made = {
                name: own[name] if policy is None else _logits(subject, these, policy, budget)
                for name, these in on.items()
            }
        except RanksDisagreeError:  # says nothing of the model
            raise
        except ValueError as error:  # of many policies one, or all for the same reason
            refused.setdefault(f"{error}", []).append(policy_name)
            continue
        for name, logits in made.items():
            labels = subject.labels[: len(logits)]
            outcome += steered(f"{policy_name}:{name}", logits, own[name], labels)
    problems = tuple(f"{', '.join(names)}: {why}" for why, names in refused.items())
    return outcome + Outcome(problems=problems)


@torch.no_grad()
def _logits(subject: Subject, images: Tensor, policy: Edit | None, budget: Budget) -> Tensor:
    with nullcontext() if policy is None else intervene(subject.model, policy):
        return subject.logits(images, budget.batch_size)


def _top_k(subject: Subject) -> int:
    """The most experts that a token takes in any layer."""
    return max(int(getattr(site.router, "top_k", 1)) for site in subject.layers.values())
