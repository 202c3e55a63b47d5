"""Images that change what becomes of their neighbour."""

import copy

import numpy as np
import pytest
import torch
import toys
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks.routing.batch_mates import BatchMates
from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, VMoE, trace_routing

wide = {"dtype": torch.float64}
GROUP, EPS = 4, 0.1


def vmoe(capacity, head_std=1.0, **options):
    torch.manual_seed(0)
    arguments = {
        "moe_layers": (0, 1),
        "num_experts": 4,
        "top_k": 2,
        "channels": 1,
        "classifier": "gap",
    } | options
    model = VMoE(12, 4, 16, 2, 2, 32, 4, capacity=capacity, **arguments)
    nn.init.normal_(model.head.weight, std=head_std)
    return model


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    images, labels = toys.blobs(64, noise=0.35)
    order = torch.randperm(64)
    return images[order].double(), labels[order]


@pytest.fixture(scope="module")
def trained(data):
    images, labels = data
    model = vmoe(Capacity(0.5, images_per_group=GROUP, multiple_of=1), head_std=0)
    return toys.fit(model, images.float(), labels, steps=25, rate=1e-2).double()


def dropped(model, group, position):
    """How many choices of one image's tokens found no place."""
    with trace_routing(model) as trace:
        model(group)
    return sum(
        (~layer.kept).view(len(group), -1)[position].sum().item() for layer in trace.layers.values()
    )


def test_mates_change_the_class_of_an_image_that_is_untouched(data, trained):
    images, labels = data
    result = BatchMates(trained, EPS, steps=10).run(images, labels)
    assert result.victims.tolist() == list(range(3, 64, 4)) and result.clean_correct.sum() >= 12
    assert result.success.sum() >= 2 * (result.noise_changed & result.clean_correct).sum() + 2
    for v, (victim, group) in enumerate(zip(result.victims.tolist(), result.groups, strict=True)):
        clean = images[victim - 3 : victim + 1]
        assert torch.equal(group[3], images[victim])
        change = (group - clean).abs()
        assert group.min() >= 0 and group.max() <= 1 and change.max() == result.distance[v] <= EPS
        before, after = trained(clean)[3], trained(group)[3]
        assert (
            before.argmax() == result.prediction_before[v]
            and after.argmax() == result.prediction[v]
        )
        assert result.clean_correct[v] == (before.argmax() == labels[victim])
        assert result.changed[v] == (before.argmax() != after.argmax())
        first = before.argmax()
        for logits, margin in ((before, result.margin_before[v]), (after, result.margin[v])):
            others = torch.cat([logits[:first], logits[first + 1 :]])
            torch.testing.assert_close(margin, logits[first] - others.max())
        assert (
            dropped(trained, clean, 3) == result.drops_before[v]
            and dropped(trained, group, 3) == result.drops[v]
        )
    assert (result.margin <= result.margin_before).all() and (
        result.drops != result.drops_before
    ).any()


def test_a_group_is_attacked_by_itself(data, trained):
    images, labels = data
    attack = BatchMates(trained, EPS, steps=2, restarts=2)
    everyone = attack.run(images[:10], labels[:10], (-1, 0))  # groups of 4, 4 and 2
    assert everyone.victims.tolist() == [3, 7, 0, 4, 9, 8]
    assert [len(group) for group in everyone.groups] == [4, 4, 4, 4, 2, 2]
    alone = attack.run(images[:4], labels[:4], [3])
    torch.testing.assert_close(alone.groups[0], everyone.groups[0], rtol=0, atol=1e-9)
    assert torch.equal(alone.drops, everyone.drops[:1]) and torch.equal(
        alone.noise_drops, everyone.noise_drops[:1]
    )
    again = attack.run(images[:10], labels[:10], (-1, 0))
    assert all(
        torch.equal(one, two) for one, two in zip(again.groups, everyone.groups, strict=True)
    )


class Pair(nn.Module):
    """Images of one pixel. Brighter than ½: to expert 0, which has one place in a pair, for the
    brighter of the two. Class 0 if it was there."""

    def __init__(self):
        super().__init__()
        self.moe = MoE(
            1,
            1,
            2,
            1,
            activation="relu",
            capacity=Capacity(places=1, images_per_group=2, priority=True),
        )
        with torch.no_grad():
            self.moe.router.weight.copy_(torch.tensor([[4.0], [-4.0]]))
            for layer in (self.moe.fc1, self.moe.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
            self.moe.fc2.bias.copy_(torch.tensor([[1.0], [-1.0]]))

    def forward(self, x):
        seen = self.moe(x.view(-1, 1, 1) - 0.5).flatten()
        return torch.stack([seen, torch.full_like(seen, 0.2)], dim=1)


def test_the_radius_at_which_a_mate_outshines_its_neighbour():
    model = Pair().double()
    images, labels = (
        torch.tensor([[0.3], [0.7], [0.1], [0.9], [0.6], [0.8]], **wide),
        torch.zeros(6, dtype=torch.int64),
    )
    needed = [0.4, 0.8, 0.2]
    for eps in (0.0, 0.19, 0.21, 0.39, 0.41, 0.79, 0.81):
        result = BatchMates(model, eps, steps=8).run(images, labels)
        assert result.clean_correct.all()
        assert result.success.tolist() == [eps >= radius for radius in needed]
        assert result.drops_before.tolist() == [0, 0, 0] and torch.equal(
            result.drops == 1, result.success
        )
    assert (result.margin[result.success] == -0.2).all()
    assert result.noise_changed.any() and torch.equal(result.noise_drops == 1, result.noise_changed)
    # x = 2 · (pixel + ½)
    shown = BatchMates(model, 0.41 / 2, steps=8, bounds=(-2, 3), normalize=([-0.5], [0.5]))
    assert shown.run((images / 2 - 0.5)[:, None, None], labels).success.tolist() == [
        True,
        False,
        True,
    ]


def test_the_first_image_of_a_group_is_served_first(data):
    images, labels = (part[:16] for part in data)
    model = vmoe(Capacity(1.0, images_per_group=4, multiple_of=1), top_k=1).double().eval()
    first = BatchMates(model, 1.0, steps=3).run(images, labels, [0])
    assert torch.equal(first.margin, first.margin_before) and torch.equal(
        first.drops, first.drops_before
    )
    last = BatchMates(model, 1.0, steps=3).run(images, labels)
    assert (last.margin < last.margin_before).any() and (last.drops != last.drops_before).any()


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": Capacity(0.75, multiple_of=1)},
        {
            "capacity": Capacity(
                0.75, images_per_group=4, multiple_of=1, priority=True, renormalize=True
            )
        },
        {"capacity": Capacity(0.75, tokens_per_group=20, multiple_of=1), "top_k": 1},
        {
            "capacity": Capacity(0.75, images_per_group=4, multiple_of=1),
            "num_experts": 8,
            "ensemble_size": 2,
        },
        {
            "capacity": None,
            "make_moe": lambda: MoE(
                16, 32, 4, router=ExpertChoiceRouter(16, 4, 0.5, images_per_group=4, multiple_of=1)
            ),
        },
    ],
    ids=["whole batch", "priority", "tokens", "ensemble", "expert choice"],
)
def test_every_way_in_which_images_compete(data, options):
    images, labels = (part[:8] for part in data)
    model = vmoe(**options).double().eval()
    result = BatchMates(model, 0.3, steps=5).run(images, labels)
    assert (result.margin <= result.margin_before).all() and (
        result.margin < result.margin_before
    ).any()
    size = len(result.groups[0])
    assert size == (8 if len(result.victims) == 1 else 4)
    for victim, group, prediction in zip(
        result.victims.tolist(), result.groups, result.prediction, strict=True
    ):
        assert torch.equal(group[-1], images[victim]) and model(group)[-1].argmax() == prediction


class Checkpointed(nn.Module):
    """Each block runs again in the backward pass."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        for block in body.blocks:
            forward = block.forward
            block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)

    def forward(self, x):
        return self.body(x)


def test_activation_checkpointing_changes_nothing(data, trained):
    images, labels = (part[:16] for part in data)
    plain = BatchMates(trained, EPS, steps=3).run(images, labels, [-1, 0])
    again = BatchMates(Checkpointed(copy.deepcopy(trained)), EPS, steps=3).run(
        images, labels, [-1, 0]
    )
    for one, other in zip(again.groups, plain.groups, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert torch.equal(again.drops, plain.drops) and torch.equal(again.prediction, plain.prediction)


class WithUnusedLayer(nn.Module):
    """A layer in which images compete, and whose output nobody reads."""

    def __init__(self, body):
        super().__init__()
        self.body, self.unused = (
            body,
            MoE(12, 8, 4, 2, capacity=Capacity(0.5, images_per_group=GROUP)).double(),
        )

    def forward(self, x):
        self.unused(x.flatten(1, 2))
        return self.body(x)


def test_a_layer_that_does_not_reach_the_logits_has_no_effect(data, trained):
    images, labels = (part[:16] for part in data)
    plain = BatchMates(trained, EPS, steps=3).run(images, labels)
    other = BatchMates(WithUnusedLayer(trained).eval(), EPS, steps=3).run(images, labels)
    for one, two in zip(other.groups, plain.groups, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_places_of_victims(data, trained):
    images, labels = (part[:6] for part in data)
    attack = BatchMates(trained, EPS, steps=1)
    for given, victims in (
        (3, [3]),
        (np.int64(-1), [3, 5]),
        ((1, -1), [1, 3, 5]),
        (torch.tensor([0, -3]), [0, 1, 4]),
    ):
        assert attack.run(images, labels, given).victims.tolist() == victims


def test_the_users_state_comes_back(data, trained):
    images, labels = data
    trained.train()
    trained.blocks[0].eval()
    before = [module.training for module in trained.modules()], torch.get_rng_state()
    with torch.inference_mode():
        BatchMates(trained, EPS, steps=2).run(images[:8].clone(), labels[:8])
    assert before[0] == [module.training for module in trained.modules()] and torch.equal(
        before[1], torch.get_rng_state()
    )
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not any(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in trained.modules()
    )
    trained.eval()


def test_what_cannot_work_is_refused(data, trained):
    images, labels = data
    alone = vmoe(Capacity(0.5, images_per_group=1)).double()
    for make, message in (
        (
            lambda: BatchMates(vmoe(None)),
            "model must let images influence each other, .* got VMoE without",
        ),
        (lambda: BatchMates(trained, -0.1), "eps must be finite and at least 0, got -0.1"),
        (lambda: BatchMates(trained, alpha=-1), "alpha must be at least 0 or None, got -1"),
        (
            lambda: BatchMates(trained, bounds=(1, 0)),
            r"bounds must be .* with lowest < highest, got \(1, 0\)",
        ),
        (lambda: BatchMates(trained, steps=0), "steps must be at least 1, got 0"),
        (lambda: BatchMates(trained, restarts=0), "restarts must be at least 1, got 0"),
        (
            lambda: BatchMates(trained).run(images, labels, [4]),
            "victim_positions must be from -4 to 3, got 4",
        ),
        (
            lambda: BatchMates(trained).run(images, labels, []),
            r"some be victims, got groups of 4 and victim_positions \[\]",
        ),
        (
            lambda: BatchMates(trained).run(images, labels, (3, -1)),
            r"differ from each other in a group of 4, got \[3, -1\]",
        ),
        (
            lambda: BatchMates(trained).run(images[:1], labels[:1]),
            r"got 1 images in groups of 4 and victim_positions \[-1\]",
        ),
        (
            lambda: BatchMates(trained).run(images[:2], labels[:2], [3]),
            r"got 2 images in groups of 4 and victim_positions \[3\]",
        ),
        (
            lambda: BatchMates(trained).run(images[:0], labels[:0]),
            r"got 0 images in groups of 4 and victim_positions \[-1\]",
        ),
        (
            lambda: BatchMates(trained).run(images, labels + 50),
            "labels must be below the model's 4 classes, got 53",
        ),
        (
            lambda: BatchMates(alone).run(images, labels),
            "images must have mates, .* got groups of 1",
        ),
        (lambda: BatchMates(trained).run(images + 1, labels), "images must lie in bounds"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for wrong in (1.5, ["last"]):
        with pytest.raises(TypeError, match="victim_positions must be a whole number or several"):
            BatchMates(trained).run(images, labels, wrong)


def test_mates_keep_to_a_mask_and_to_bounds_of_elements(data, trained):
    images, labels = data
    mask = (torch.arange(12) % 3 > 0).double().view(1, 1, 12)
    bounds = (images.amin(0) - 0.05, images.amax(0) + 0.05)
    result = BatchMates(trained, EPS * mask, steps=4, bounds=bounds).run(images, labels)
    change = torch.stack(result.groups) - images.unflatten(0, (-1, GROUP))
    assert change.abs().amax() > 0.5 * EPS
    assert (change.abs() <= EPS * mask).all()
    assert not change[:, 3].any()  # the victim
    assert (result.distance <= EPS).all()

    same = BatchMates(trained, torch.full((12,), EPS, dtype=torch.float64), steps=4)
    plain = BatchMates(trained, EPS, steps=4).run(images, labels)
    for one, other in zip(same.run(images, labels).groups, plain.groups, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="eps must be the same for all images"):
        BatchMates(trained, EPS * torch.rand(64)).run(images, labels)
