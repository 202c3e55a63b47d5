"""Routing modes on models of other kinds: Hugging Face, upcycled, compiled."""

from contextlib import contextmanager

import hf_families
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ironmoe.attacks import PGD, evaluate
from ironmoe.attacks.engine.routing_mode import RoutingMode
from ironmoe.attacks.routing.auxiliary_loss import AuxiliaryLoss
from ironmoe.attacks.routing.modes import (
    ExpertsOnly,
    FrozenRouting,
    GatesOnly,
    RoutingDivergence,
    Softened,
    StraightThrough,
)
from ironmoe.moe import VMoE, routing_change, trace_routing, upcycle

wide = {"dtype": torch.float64}
MODES = [
    FrozenRouting(), FrozenRouting("fresh"), GatesOnly(), ExpertsOnly(), StraightThrough(),
    Softened(0.5),
    RoutingDivergence(), RoutingDivergence(2.0, "weakest"), RoutingDivergence(0.5, 1),
]  # fmt: skip


class Pictures(nn.Module):
    """A language model of Hugging Face that reads the rows of an image."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.body = nn.Linear(6, body.config.hidden_size, **wide), body

    def forward(self, images):
        return self.body(inputs_embeds=self.rows(images.flatten(1, 2))).logits[:, -1, :3]


@pytest.fixture
def images():
    return torch.rand(6, 1, 6, 6, **wide)


def routed(model, images):
    with trace_routing(model) as trace:
        model(images)
    return trace.layers


@pytest.mark.parametrize("patched", [False, True])
def test_hugging_face_models_take_every_mode(images, patched):
    body = hf_families.build("mixtral", torch.float64)
    model = Pictures(hf_families.patched(body) if patched else body).eval()
    labels = model(images).argmax(1)
    for mode in MODES:
        attack = PGD(model, 0.3, steps=2, routing=mode)
        if mode == FrozenRouting("fresh"):
            with pytest.raises(
                ValueError,
                match=r'\.experts\' makes gates, which it does not tell; use gates="recorded"',
            ):
                attack.run(images, labels)
            continue
        result = attack.run(images, labels)
        assert torch.equal(result.prediction, model(result.adversarial).argmax(1))
        assert result.success.any() or isinstance(mode, RoutingDivergence), mode

    with pytest.raises(
        ValueError, match="needs a model that makes one in eval mode, got Pictures without"
    ):
        PGD(model, 0.3, steps=2, routing=AuxiliaryLoss()).run(images, labels)

    clean, moved = routed(model, images), (images + 0.3 * torch.randn_like(images)).clamp(0, 1)
    attempts = FrozenRouting().record(model, images)
    with FrozenRouting().around(model, attempts):
        frozen = routed(model, moved)
    free = routed(model, moved)
    for name, layer in clean.items():
        assert routing_change(layer, frozen[name]) == 0 < routing_change(layer, free[name])
        torch.testing.assert_close(frozen[name].gates, layer.gates)
    with StraightThrough().around(model, {}):
        steered = model(moved)
    torch.testing.assert_close(steered, model(moved), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("patched", [False, True])
def test_gradients_through_gates_and_through_experts_of_a_hugging_face_block_add_up(patched):
    body = hf_families.build("mixtral", torch.float64)
    block = (hf_families.patched(body) if patched else body).model.layers[0].mlp
    x = torch.randn(2, 7, body.config.hidden_size, **wide)
    weights = torch.randn(x.shape, **wide)
    grads, outputs = [], []
    for mode in (RoutingMode(), GatesOnly(), ExpertsOnly()):
        points = x.clone().requires_grad_()
        with mode.around(block, {}):
            outputs.append(block(points))
        grads.append(torch.autograd.grad((outputs[-1] * weights).sum(), points)[0])
    full, gates, experts = grads
    torch.testing.assert_close(gates + experts, full, rtol=0, atol=1e-10)
    assert gates.abs().max() > 1e-3 and experts.abs().max() > 1e-3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_a_router_without_logits_is_refused_where_they_are_needed(images):
    model = Pictures(hf_families.build("gemma4", torch.float64)).eval()
    labels = model(images).argmax(1)
    for mode in (StraightThrough(), Softened(), RoutingDivergence(), RoutingDivergence(1.0, 0)):
        with pytest.raises(
            ValueError,
            match=r"needs the router's logits, which the router of .*experts' does not give",
        ):
            PGD(model, 0.1, steps=1, routing=mode).run(images, labels)
    PGD(model, 0.1, steps=1, routing=FrozenRouting()).run(images, labels)


def upcycled():
    torch.manual_seed(0)
    dense = VMoE(6, 3, 12, 1, 2, 16, 3, channels=1)
    nn.init.normal_(dense.head.weight)
    return upcycle(dense, 4, 2, noise=0.5).double().eval()


@pytest.mark.parametrize("mode", [*MODES, AuxiliaryLoss()], ids=str)
def test_upcycled_models_take_every_mode(images, mode):
    model = upcycled()
    result = PGD(model, 0.3, steps=4, routing=mode).run(images, model(images).argmax(1))
    assert result.success.any() and torch.equal(
        result.prediction, model(result.adversarial).argmax(1)
    )


def test_compiled_models_run_eagerly_under_a_mode(images):
    model = upcycled()
    compiled = torch.compile(model, backend="eager")
    weights = torch.randn(3, **wide)
    for mode in (FrozenRouting(), GatesOnly(), StraightThrough()):
        grads = []
        for one in (model, compiled):
            attempts, points = mode.record(one, images), (images * 0.8).requires_grad_()
            with mode.around(one, attempts):
                output = one(points)
            grads.append(torch.autograd.grad((output * weights).sum(), points)[0])
        torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-12)
        points = (images * 0.8).requires_grad_()
        free = torch.autograd.grad((model(points) * weights).sum(), points)[0]
        assert (grads[1] - free).abs().max() > 1e-6


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def small_vmoe():
    torch.manual_seed(0)
    model = VMoE(
        6, 3, 12, 2, 2, 16, 3, moe_layers=(0, 1), num_experts=4, channels=1, classifier="gap"
    )
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        model.stem.weight.mul_(4)
    return model.double().eval()


@pytest.mark.parametrize(
    "mode",
    [
        FrozenRouting(),
        GatesOnly(),
        ExpertsOnly(),
        StraightThrough(),
        Softened(),
        RoutingDivergence(),
    ],
    ids=str,
)
def test_modes_go_with_activation_checkpointing(mode):
    model = Checkpointed(small_vmoe())
    x = torch.rand(9, 1, 6, 6, dtype=torch.float64)
    labels = model(x).argmax(1)
    kept, plain = (
        PGD(m, 0.1, steps=3, early_stop=False, routing=mode)(x, labels) for m in (model, model.body)
    )
    torch.testing.assert_close(kept, plain, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_clean_routing_is_recorded_as_the_search_sees_images(dtype):
    model, x = small_vmoe(), torch.rand(9, 1, 6, 6, dtype=torch.float64)
    model, x = (model.float(), x.float()) if dtype else (model, x)
    labels, seen = model((x - 0.5) / 0.1).argmax(1), []

    class Watched(FrozenRouting):
        @contextmanager
        def around(self, model, attempts):
            with super().around(model, attempts) as term, trace_routing(model) as trace:
                yield term
            seen.append((attempts["clean"], trace.layers))

    attack = PGD(
        model,
        0.1,
        steps=3,
        early_stop=False,
        normalize=((0.5,), (0.1,)),
        routing=Watched(),
        attack_dtype=dtype,
    )
    attack.run(x, labels)
    for clean, layers in seen:
        with (
            trace_routing(model) as trace,
            torch.autocast("cpu", enabled=dtype is not None, dtype=torch.bfloat16),
        ):
            model((clean - 0.5) / 0.1)
        assert all(routing_change(trace.layers[name], layer) == 0 for name, layer in layers.items())
    with trace_routing(model) as trace:
        model(x)
    assert routing_change(trace.layers["blocks.1.mlp"], seen[-1][1]["blocks.1.mlp"]) > 0


@pytest.mark.parametrize("limit", [40, 60, 100])
def test_the_pass_that_records_counts(limit):
    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.made = small_vmoe(), 0

        def forward(self, x):
            self.made += len(x)
            return self.body(x)

    model, x = Counted(), torch.rand(9, 1, 6, 6, dtype=torch.float64)
    labels = model(x).argmax(1)
    model.made = 0
    attack = PGD(model, 0.05, steps=3, routing=FrozenRouting())
    result = attack.run(x, labels)
    assert result.forwards.sum() == model.made == attack.attacked_model.forwards
    model.made = 0
    evaluate(
        model,
        (x, labels),
        {"pgd": PGD(model, 0.0, steps=30, routing=FrozenRouting())},
        max_forwards=limit,
        checks=False,
    )
    assert model.made <= limit
