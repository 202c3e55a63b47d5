"""Goals on linear models, where the largest change of an output is known: reached up to that, and
no further."""

import itertools

import pytest
import torch

from ironmoe.attacks import (
    APGD,
    CW,
    PGD,
    ClassSet,
    Confident,
    EmbeddingDistance,
    MultiLabel,
    Regression,
    Segmentation,
    Superclass,
    TopK,
)

NORMS = {"Linf": 1, "L2": 2}  # the norm of a ball → that of a weight, which says how far it moves
ATTACKS = [PGD, APGD]
every_attack = pytest.mark.parametrize("make", ATTACKS)
every_norm = pytest.mark.parametrize("norm", NORMS)

# The box is so wide that it is never met.
FAR = {"bounds": (-100.0, 100.0), "steps": 60}
PIXELS, COUNT, EPS = 10, 40, 0.1


class Linear:
    """outputs = x @ weight + bias, in float64."""

    def __init__(self, outputs, seed=0, shape=None):
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(PIXELS, outputs, generator=generator, dtype=torch.float64)
        self.images = torch.randn(COUNT, PIXELS, generator=generator, dtype=torch.float64)
        self.shape = shape or (outputs,)

    def __call__(self, x):
        return (x @ self.weight.to(x.dtype)).unflatten(1, self.shape)

    @property
    def outputs(self):
        return self(self.images)


def reach(weight, norm, eps=EPS):
    """(…) how far ⟨weight, d⟩ gets inside the ball, of weights (PIXELS, …)."""
    return eps * weight.norm(p=NORMS[norm], dim=0)


def check(make, norm, model, labels, goal, most, *, rest=0.02):
    """``most`` (N,) is the highest value of what decides: above 0 the image must fall, unless it is
    within ``rest`` of 0, and below 0 it must hold."""
    result = make(model, EPS, norm=norm, goal=goal, **FAR).run(model.images, labels)
    assert not result.success[most < -1e-9].any(), "a success beyond the closed form"
    assert result.success[result.clean_correct & (most > rest)].all(), "an image held"
    decided = (most < -1e-9) | (most > rest)
    assert decided.float().mean() > 0.8
    assert (most > rest).any() and (most < 0).any()
    return result


@every_attack
@every_norm
def test_one_number_moves_by_eps_times_the_dual_norm_of_the_weights(make, norm):
    """|w·d| ≤ eps‖w‖; the tolerance lies a little below it, and a little above."""
    model = Linear(1)
    most = float(reach(model.weight[:, 0], norm))
    options = {"norm": norm, **FAR}
    for tolerance, falls in ((0.999 * most, True), (1.001 * most, False)):
        goal = Regression(tolerance)
        result = make(model, EPS, goal=goal, **options).run(model.images, model.outputs)
        assert result.clean_correct.all() and result.clean_figure.max() == 0
        assert result.success.all() == falls and result.success.any() == falls
        assert result.figure.max() <= most * (1 + 1e-9)


@every_attack
@every_norm
def test_the_largest_error_of_several_numbers(make, norm):
    """The best number to move is the one whose error and reach add up to the most."""
    model = Linear(3, seed=1)
    errors = 5 * torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(5)).double()
    highest = (errors.abs() + reach(model.weight, norm)).amax(1)
    tolerance = float(highest.median())
    labels = model.outputs - errors
    goal = Regression(tolerance)
    # Far ahead at first is far ahead all the way; others may have been led to another number.
    rank = errors.abs().sort(1).values
    clear = rank[:, 2] - rank[:, 1] > 2 * reach(model.weight, norm).max()
    result = make(model, EPS, norm=norm, goal=goal, **FAR).run(model.images, labels)
    assert clear.sum() > 3
    falls = highest > tolerance + 0.02
    assert result.success[clear & falls & result.clean_correct].all()
    assert not result.success[highest < tolerance - 1e-9].any()


@every_attack
@every_norm
def test_a_number_is_led_to_a_value_no_farther_away_than_it_can_move(make, norm):
    model = Linear(1, seed=2)
    far = 2 * torch.rand(COUNT, 1, generator=torch.Generator().manual_seed(6)).double()
    tolerance = 0.05
    most = reach(model.weight[:, 0], norm) + tolerance - far[:, 0]
    goal = Regression(tolerance, targeted=True)
    check(make, norm, model, model.outputs + far, goal, most, rest=0.05)


@every_attack
@every_norm
def test_an_embedding_moves_in_euclidean_length_by_the_norm_of_its_weights(make, norm):
    """Of an orthogonal map the L2 ball goes to the L2 ball, and the Linf ball's corners lie at
    eps·√D."""
    model = Linear(PIXELS, seed=3)
    model.weight = torch.linalg.qr(model.weight).Q
    most = EPS * (PIXELS**0.5 if norm == "Linf" else 1)
    for distance, falls in ((0.99 * most, True), (1.001 * most, False)):
        goal = EmbeddingDistance(distance, metric="l2")
        attack = make(model, EPS, norm=norm, goal=goal, **FAR)
        result = attack.run(model.images, model.outputs)
        assert result.success.all() == falls and result.success.any() == falls


@every_attack
def test_an_embedding_turns_by_the_angle_that_the_ball_is_seen_under(make):
    """From the origin a ball of radius eps around an embedding of length r is seen under the angle
    asin(eps / r)."""
    model = Linear(PIXELS, seed=4)
    model.weight = torch.linalg.qr(model.weight).Q
    angle = (EPS / model.images.norm(dim=1)).asin()
    farthest = 1 - angle.cos()
    for share, falls in ((0.98, True), (1.001, False)):
        distance = share * farthest
        for one in range(5):
            goal = EmbeddingDistance(float(distance[one]))
            attack = make(model, EPS, norm="L2", goal=goal, **FAR)
            part = slice(one, one + 1)
            result = attack.run(model.images[part], model.outputs[part])
            assert bool(result.success) == falls


@every_norm
@pytest.mark.parametrize("wrong", [1, 2])
def test_labels_fall_each_by_itself_where_they_see_other_pixels(norm, wrong):
    """Each of 5 labels sees two pixels of its own, and all are equally fast. In Linf all of them
    may be moved at a time; in L2 the length is shared, and what ``wrong`` labels need adds up in
    squares. The search begins at the image, where the nearest labels are those to be moved."""
    model = Linear(5, seed=5)
    model.weight = model.weight * (torch.arange(PIXELS).unsqueeze(1) // 2 == torch.arange(5))
    model.weight = model.weight / model.weight.norm(p=NORMS[norm], dim=0)
    model.images = model.images / (3 if wrong == 1 else 8)  # so that a part falls
    logits = model.outputs

    smallest = logits.abs().sort(1).values[:, :wrong]  # the eps that each label needs
    least = smallest[:, -1] if norm == "Linf" else smallest.norm(dim=1)
    goal = MultiLabel(wrong=wrong)
    attack = PGD(model, EPS, norm=norm, goal=goal, random_start=False, **FAR)
    result = attack.run(model.images, logits > 0)
    assert result.success[least < EPS - 0.01].all() and not result.success[least > EPS].any()
    assert result.success.any() and not result.success.all()

    result = APGD(model, EPS, norm=norm, goal=goal, **FAR).run(model.images, logits > 0)
    assert not result.success[least > EPS].any() and result.success.any()


@every_attack
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("loss", ["ce", "masked_ce", "js", None])
def test_pixels_fall_each_by_itself_where_they_see_one_pixel_each(make, share, loss):
    """In Linf every pixel that lies within reach falls, and no other."""
    model = Pixelwise()
    logits = model(model.images)
    labels = logits.argmax(1)
    two = logits.topk(2, dim=1).values
    within = (two[:, 0] - two[:, 1]) / 2 < EPS  # the gap closes at twice the speed of a pixel
    least_right = 1 - within.double().mean(1)
    goal = Segmentation(share)
    attack = make(model, EPS, goal=goal, loss=loss, **FAR)
    result = attack.run(model.images, labels)
    assert torch.equal(result.success, least_right < share)
    assert result.success.any() and not result.success.all()
    assert (result.figure >= least_right - 1e-9).all()

    # Those that are nearest at the image are the ones to be moved.
    attack = PGD(model, EPS, goal=goal, loss="margin", random_start=False, **FAR)
    assert torch.equal(attack.run(model.images, labels).success, result.success)


class Pixelwise:
    """Two classes a pixel with the logits x and −x."""

    def __init__(self):
        generator = torch.Generator().manual_seed(8)
        spread = 0.05 + 0.4 * torch.rand(COUNT, 1, generator=generator, dtype=torch.float64)
        self.images = spread * torch.randn(COUNT, 20, generator=generator, dtype=torch.float64)

    def __call__(self, x):
        return torch.stack([x, -x], 1)


@every_attack
@every_norm
def test_a_class_leads_by_the_reach_of_the_difference_of_the_weights(make, norm):
    """Two classes: the margin grows by eps‖w₁ − w₀‖."""
    model = Linear(2, seed=6)
    model.images = model.images / 5
    labels = model.outputs.argmax(1)
    two = model.outputs.sort(1).values
    gap = two[:, 1] - two[:, 0]
    moved = reach(model.weight[:, 1] - model.weight[:, 0], norm)
    for margin in (0.0, 0.3):
        check(make, norm, model, labels, Confident(margin), moved - gap - margin)
        check(make, norm, model, 1 - labels, Confident(margin, targeted=True), moved - gap - margin)


@every_attack
@every_norm
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_label_leaves_the_k_best_where_so_many_classes_pass_it_at_a_time(make, norm, k):
    """All other classes have the same weights, so that all differences move together."""
    model = Linear(5, seed=7)
    model.weight[:, 1:] = model.weight[:, 1:2]
    bias = torch.tensor([0.0, 0.3, 0.1, -0.1, -0.4], dtype=torch.float64)
    labels = torch.zeros(COUNT, dtype=torch.int64)

    def biased(x):
        return model(x) + bias.to(x.dtype)

    biased.images = model.images / 5
    gaps = biased(biased.images)[:, :1] - biased(biased.images)[:, 1:]
    moved = reach(model.weight[:, 1] - model.weight[:, 0], norm)
    most = moved - gaps.sort(1).values[:, k - 1]
    check(make, norm, biased, labels, TopK(k), most)

    back = moved + gaps.sort(1).values[:, k - 1]
    check(make, norm, biased, labels, TopK(k, targeted=True), back)


@pytest.mark.parametrize("goal", [Superclass([0, 0, 1, 1]), ClassSet()])
@every_attack
@every_norm
def test_a_set_of_classes_is_left_only_for_a_class_outside(make, norm, goal):
    """The two classes of a set have the same weights, and so the lead within a set never moves."""
    model = Linear(4, seed=9)
    model.weight[:, 1], model.weight[:, 3] = model.weight[:, 0], model.weight[:, 2]
    model.images = model.images / 5
    bias = torch.tensor([0.1, 0.0, 0.0, 0.2], dtype=torch.float64)

    def biased(x):
        return model(x) + bias.to(x.dtype)

    biased.images = model.images
    outputs = biased(model.images)
    labels = outputs.argmax(1)
    gap = (outputs[:, 0] - outputs[:, 3]).abs()
    if isinstance(goal, ClassSet):
        labels = torch.tensor([0, 0, 1, 1])[labels].unsqueeze(1) == torch.tensor([0, 0, 1, 1])
    moved = reach(model.weight[:, 2] - model.weight[:, 0], norm)
    check(make, norm, biased, labels, goal, moved - gap)


def test_cw_finds_the_least_change_for_goals_of_any_kind():
    """Of a linear model: the distance to the tolerance, over ‖w‖."""
    model = Linear(1, seed=10)
    goal = Regression(0.5)
    attack = CW(model, goal=goal, bounds=(-5.0, 5.0), steps=200, search_steps=9)
    result = attack.run(model.images[:4], model.outputs[:4])
    least = 0.5 / model.weight.norm()
    assert result.success.all()
    assert (result.distance >= least * (1 - 1e-6)).all()
    assert (result.distance <= least * 1.02).all()


@pytest.mark.parametrize("share", [k / 20 for k in range(1, 21)])
def test_a_share_of_pixels_is_met_exactly(share):
    """Of 20 pixels k are right: the share k / 20 is not below ``share`` = k / 20."""
    labels = torch.zeros(21, 20, dtype=torch.int64)
    right = torch.arange(20) < torch.arange(21).unsqueeze(1)
    outputs = torch.stack([right.double(), 0.5 * torch.ones(21, 20)], 1)
    below = torch.arange(21) / 20 < share - 1e-9
    assert torch.equal(Segmentation(share).reached(outputs, labels), below)
    assert torch.equal(Segmentation(share, targeted=True).reached(outputs, labels), ~below)
    for goal in (Segmentation(share), Segmentation(share, targeted=True)):
        margin = goal.loss_named("margin")(outputs, labels)
        assert torch.equal(margin > 0, goal.reached(outputs, labels))


def test_the_sign_of_a_margin_is_the_verdict():
    """For every goal that has one, on random outputs."""
    generator = torch.Generator().manual_seed(11)
    outputs = torch.randn(300, 6, generator=generator, dtype=torch.float64)
    near = outputs + 0.4 * torch.randn(300, 6, generator=generator, dtype=torch.float64)
    classes = torch.randint(6, (300,), generator=generator)
    cases = [
        *((TopK(k), classes) for k in range(1, 6)),
        *((Confident(margin), classes) for margin in (0.0, 0.5)),
        (Superclass([0, 1, 1, 2, 2, 2]), classes),
        (ClassSet(), near > near.median(1, keepdim=True).values),
        *((MultiLabel(wrong=wrong), (near > 0).long()) for wrong in (1, 2, 6)),
        (MultiLabel(threshold=0.3), near > 0),
        *((Regression(0.5, measure=measure), near) for measure in ("max", "mean", "l2")),
        (EmbeddingDistance(0.05), near),
        (EmbeddingDistance(1.0, metric="l2"), near),
    ]
    for (goal, labels), targeted in itertools.product(cases, (False, True)):
        goal = type(goal)(**{**vars(goal), "targeted": targeted})
        reached = goal.reached(outputs, labels)
        assert torch.equal(goal.loss_named("margin")(outputs, labels) > 0, reached), goal
        assert goal.loss(outputs, labels).shape == (300,)
