"""``routing=`` of every method: it steers the inner attack, and the outer passes are free."""

import hf_families
import pytest
import torch
from torch import nn
from training_toys import EPS, batch, rows

from ironmoe.attacks import Ensemble, ExpertsOnly, FrozenRouting, GatesOnly, StraightThrough
from ironmoe.attacks.training import (
    PGDAT,
    TRAINING_METHODS,
    Alternating,
    Free,
    RoutingConsistency,
    SecondRanked,
    Standard,
)
from ironmoe.attacks.training.routers import router_weights
from ironmoe.moe import Capacity, VMoE, intervene, trace_routing, upcycle
from ironmoe.moe.policies import UseRanks

MODES = [FrozenRouting(), FrozenRouting("fresh"), GatesOnly(), ExpertsOnly(), StraightThrough()]
OF_EXPERTS = [Alternating, SecondRanked, RoutingConsistency]


def points_of(method, images, labels):
    """The points of the first update, as the outer pass gets them."""
    seen = []
    losses_at = method._attacked

    def keep(*batch):
        seen.append(losses_at(*batch))
        return seen[-1]

    method._attacked = keep
    torch.manual_seed(3)
    for update in method.updates(images, labels):
        update.loss.backward()
    return seen[0].points.detach()


# Free makes its images by its outer passes, which are free.
ATTACKING = [name for name, entry in TRAINING_METHODS.items() if entry.kind not in (Free, Standard)]


@pytest.mark.parametrize("name", ATTACKING)
def test_every_method_takes_every_mode_and_its_outer_passes_are_free(name):
    kind = TRAINING_METHODS[name].kind
    images, labels = batch()
    options = {} if TRAINING_METHODS[name].single_step else {"steps": 2}
    plain = points_of(kind(rows(), EPS, norm="L2", **options), images, labels)
    for mode in MODES:
        model = rows()
        points = points_of(kind(model, EPS, norm="L2", routing=mode, **options), images, labels)
        assert not torch.equal(points, plain), mode
        # what is constant in the attack has gradients in the outer passes
        for moe in model.moes:
            assert moe.router.weight.grad.abs().max() > 0, mode
            assert moe.fc1.weight.grad.abs().max() > 0, mode


@pytest.mark.parametrize("name", ["alternating", "second-ranked", "routing-consistency"])
def test_a_frozen_attack_routes_every_point_as_its_clean_image(name):
    """In the world of each attack: that of the second experts has their clean routing."""
    model, (images, labels) = rows().eval(), batch()
    seen = []
    method = TRAINING_METHODS[name].kind(model, EPS, steps=2, routing=FrozenRouting())
    inner, ask = method.inner.asked, method.inner.asked._ask

    def traced(*arguments):
        with trace_routing(model) as trace:
            answer = ask(*arguments)
        seen.append([layer.experts for layer in trace.layers.values()])
        return answer

    inner._ask = traced
    batch_as_outer_pass = method._attacked(images, labels)
    worlds = [seen[:2], seen[2:]] if name == "second-ranked" else [seen]
    policies = [UseRanks(1), UseRanks(3)]
    for world, policy in zip(worlds, policies, strict=False):
        assert len(world) == 2
        with intervene(model, policy), trace_routing(model) as clean:
            model(images)
        for step in world:
            for layer, experts in zip(clean.layers.values(), step, strict=True):
                assert torch.equal(layer.experts, experts)
    with trace_routing(model) as free:
        model(batch_as_outer_pass.points[:6].to(images))
    moved = [
        not torch.equal(layer.experts, experts)
        for layer, experts in zip(free.layers.values(), worlds[0][0], strict=True)
    ]
    assert any(moved)


class Pictures(nn.Module):
    """A language model of Hugging Face that reads the rows of an image."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.body = nn.Linear(4, body.config.hidden_size).double(), body

    def forward(self, images):
        return self.body(inputs_embeds=self.rows(images.flatten(1, 2))).logits[:, -1, :3]


def hugging_face():
    return Pictures(hf_families.build("mixtral", torch.float64))


def patched():
    return Pictures(hf_families.patched(hf_families.build("mixtral", torch.float64)))


def upcycled():
    torch.manual_seed(0)
    dense = VMoE(4, 2, 12, 1, 2, 16, 3, channels=1)
    nn.init.normal_(dense.head.weight)
    return upcycle(dense, 4, 2, noise=0.5).double()


def ensemble_of_experts():
    torch.manual_seed(0)
    options = {"moe_layers": (0,), "num_experts": 8, "top_k": 2, "ensemble_size": 2}
    model = VMoE(4, 2, 12, 1, 2, 16, 3, channels=1, **options)
    nn.init.normal_(model.head.weight)
    return model.double()


def ensemble_of_models():
    return Ensemble([rows(), upcycled()])


def with_capacity():
    return rows(capacity=Capacity(1.0, images_per_group=2, multiple_of=1))


OTHERS = [hugging_face, patched, upcycled, ensemble_of_experts, ensemble_of_models, with_capacity]


@pytest.mark.filterwarnings("ignore:model has a capacity")
@pytest.mark.parametrize("kind", [PGDAT, *OF_EXPERTS])
@pytest.mark.parametrize("make", OTHERS)
def test_models_of_other_kinds_train_by_every_method(make, kind):
    model, (images, labels) = make(), batch(2)
    for mode in (FrozenRouting(), ExpertsOnly()):
        method = kind(model, EPS, steps=1, routing=mode)
        model.zero_grad()
        for update in method.updates(images, labels):
            update.loss.backward()
        for weights in router_weights(model).values():
            assert weights and all(weight.grad.isfinite().all() for weight in weights)
            assert any(weight.grad.abs().max() > 0 for weight in weights)
