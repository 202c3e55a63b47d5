"""Which arms a claim compares."""

from collections.abc import Sequence
from math import log2

from ironmoe.bench.study.ladder.arms import BASE_EXPERTS, LADDER, TOP_K, Arm


def dense_arm(arms: Sequence[Arm]) -> Arm | None:
    """The first arm without experts: of models that were handed in, the one that others are
    compared with."""
    return next((arm for arm in arms if arm.is_dense), None)


def of_other_cost(arms: Sequence[Arm]) -> list[Arm]:
    """Those that comparisons at equal cost leave out."""
    return [arm for arm in arms if arm.equal_width and LADDER.get(arm.name) != arm]


def expert_ladder(arms: Sequence[Arm], *, renormalize: bool) -> list[Arm]:
    """Arms that differ in E alone, at equal FLOPs, from few experts to many.

    They have the K of which there are most, 2 if several are as many. An arm whose tokens take all
    experts is in both ladders: its softmax sums to 1 as it is. Of arms that differ in nothing but
    their names the first one stands for all.
    """
    fitting = [arm for arm in _gated(arms, renormalize) if not arm.equal_width]
    if not fitting:
        return []

    ks = [arm.top_k for arm in fitting]
    most = max(set(ks), key=lambda k: (ks.count(k), -abs(k - TOP_K), k))
    return _one_each([arm for arm in fitting if arm.top_k == most], "experts")


def reference_arm(arms: Sequence[Arm], *, renormalize: bool) -> Arm | None:
    """The arm of the ladder whose number of experts is nearest to 8: one is chosen before anything
    is measured, so that no claim picks the best of several."""
    return _nearest_to_base(expert_ladder(arms, renormalize=renormalize))


def deciding_arm(arms: Sequence[Arm], *, at_any_cost: bool = False) -> Arm | None:
    """The arm with experts that a claim is decided on: the reference arm with the gates of the
    source; without one that with gates that sum to 1; at_any_cost: for a claim that compares no
    costs, without that, too, the arm of other FLOPs whose number of experts is nearest to 8."""
    for renormalize in (False, True):
        arm = reference_arm(arms, renormalize=renormalize)
        if arm is not None:
            return arm
    return _nearest_to_base([arm for arm in arms if not arm.is_dense]) if at_any_cost else None


def twin_arm(arms: Sequence[Arm], arm: Arm) -> Arm | None:
    """The arm that differs in its gates alone, which sum to 1; None without one, or if those of
    ``arm`` do."""
    if arm.renormalize or arm.experts == arm.top_k:
        return None
    same = (arm.experts, arm.top_k, arm.equal_width)
    twins = [a for a in arms if a.renormalize and (a.experts, a.top_k, a.equal_width) == same]
    return next(iter(twins), None)


def in_place_of_others(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Pairs of arms with experts that differ in nothing but their names. Of each pair ladders have
    the first one alone."""
    first: dict[Arm, Arm] = {}
    pairs = []
    for arm in (each for each in arms if not each.is_dense):
        nameless = arm._replace(name="")
        if nameless in first:
            pairs.append((first[nameless], arm))
        first.setdefault(nameless, arm)
    return pairs


def without_experts(arms: Sequence[Arm]) -> str:
    """What is missing for a comparison at equal cost, for a message."""
    if all(arm.is_dense for arm in arms):
        return "an arm with experts"
    return "an arm with experts whose FLOPs are those of the dense arm"


def choice_ladder(arms: Sequence[Arm], *, renormalize: bool, equal_width: bool) -> list[Arm]:
    """Arms that differ in K alone, at equal FLOPs or at equal width of an expert, around the
    reference arm."""
    middle = reference_arm(arms, renormalize=renormalize)
    if middle is None:
        return []
    others = [
        arm
        for arm in _gated(arms, renormalize)
        if arm.experts == middle.experts
        and arm.equal_width == equal_width
        and arm.top_k != middle.top_k
    ]
    return _one_each([middle, *others], "top_k")


def described(arm: Arm) -> str:
    """An arm in a sentence; a model that was handed in has the name that it was given."""
    if LADDER.get(arm.name) != arm:
        return f"“{arm.name}”"
    if arm.is_dense:
        return "the dense ViT"
    gates = " and gates that sum to 1" if arm.renormalize else ""
    return f"the V-MoE with {arm.experts} expert{'s' * (arm.experts != 1)}{gates}"


def _nearest_to_base(arms: Sequence[Arm]) -> Arm | None:
    return min(arms, key=lambda arm: abs(log2(arm.experts / BASE_EXPERTS)), default=None)


def _gated(arms: Sequence[Arm], renormalize: bool) -> list[Arm]:
    """The arms with experts and such gates. One whose tokens take all experts has both kinds, and
    stands in where the same arm of the other kind is not there."""
    kind = [arm for arm in arms if not arm.is_dense and arm.renormalize == renormalize]
    there = {(arm.experts, arm.top_k, arm.equal_width) for arm in kind}
    both = [
        arm
        for arm in arms
        if not arm.is_dense
        and arm.experts == arm.top_k
        and (arm.experts, arm.top_k, arm.equal_width) not in there
    ]
    return kind + both


def _one_each(arms: Sequence[Arm], field: str) -> list[Arm]:
    """The first arm of each value of a field, in the order of these."""
    first: dict[int, Arm] = {}
    for arm in arms:
        first.setdefault(int(getattr(arm, field)), arm)
    return [first[value] for value in sorted(first)]
