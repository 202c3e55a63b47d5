"""What a routing mode does to the search, and that it does it to each image alone."""

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from ironmoe.attacks import FGSM, MIFGSM, PGD, evaluate
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
from ironmoe.kernels import Routing
from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    MoE,
    SoftMoE,
    TopKRouter,
    VMoE,
    aux_loss_in_eval,
    collect_aux_loss,
    intervene,
    routing_change,
    trace_routing,
)
from ironmoe.moe.policies import AllExperts, OneExpert
from ironmoe.moe.routers.top_k import RouterOutput

wide = {"dtype": torch.float64}
EACH_ALONE = [
    FrozenRouting(), FrozenRouting("fresh"), GatesOnly(), ExpertsOnly(), StraightThrough(),
    Softened(0.5),
    RoutingDivergence(), RoutingDivergence(2.0, "weakest"), RoutingDivergence(0.5, 1),
]  # fmt: skip


def vmoe(**options):
    """A V-MoE with two MoE layers and 4 tokens, with a random head, whose tokens differ and whose
    routers are easily moved."""
    torch.manual_seed(0)
    arguments = {
        "moe_layers": (0, 1),
        "num_experts": 4,
        "top_k": 2,
        "channels": 1,
        "classifier": "gap",
    } | options
    model = VMoE(6, 3, 12, 2, 2, 16, 3, **arguments)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        model.stem.weight.mul_(4)
        for block in model.blocks:
            if hasattr(block.mlp, "router"):
                block.mlp.router.weight.mul_(3)
    return model.double().eval()


def expert_choice():
    return MoE(
        12,
        16,
        4,
        router=ExpertChoiceRouter(12, 4, 1.0, images_per_group=3, multiple_of=1),
        activation="gelu_tanh",
    )


MODELS = {
    "top-2": {},
    "all experts, renormalised": {"top_k": 4, "router": {"renormalize": True}},
    "capacity": {
        "capacity": Capacity(0.75, images_per_group=3, multiple_of=1),
        "router": {"renormalize": True},
    },
    "priority": {
        "capacity": Capacity(
            0.75, images_per_group=3, multiple_of=1, priority=True, renormalize=True
        )
    },
    "expert choice": {"make_moe": expert_choice},
    "ensemble": {"ensemble_size": 2, "num_experts": 6},
}


@pytest.fixture
def images():
    return torch.rand(9, 1, 6, 6, **wide)


def routed(model, images):
    with trace_routing(model) as trace:
        model(images)
    return trace.layers


def asked(mode):
    """The mode, and a list of (rows' images, routing of each layer) of every pass of the search."""
    passes = []

    class Watched(RoutingMode):
        coupled_by_loss = mode.coupled_by_loss

        def record(self, model, clean, ask=None):
            return mode.record(model, clean, ask)

        @contextmanager
        def around(self, model, attempts):
            with mode.around(model, attempts) as term, trace_routing(model) as trace:
                yield term
            passes.append((attempts, trace.layers))

    return Watched(), passes


@pytest.mark.parametrize("gates", ["recorded", "fresh"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_frozen_search_keeps_the_routing_of_the_clean_images_at_every_step(images, kind, gates):
    model = vmoe(**MODELS[kind])
    labels = model(images).argmax(1)
    mode, passes = asked(FrozenRouting(gates))
    attack = PGD(model, 0.2, steps=3, early_stop=False, routing=mode)
    if kind == "expert choice" and gates == "fresh":
        with pytest.raises(ValueError, match='use gates="recorded"'):
            attack.run(images, labels)
        return
    result = attack.run(images, labels)
    moved = 0.0
    assert len(passes) == 4
    for attempts, layers in passes:
        clean, free = routed(model, attempts["clean"]), routed(model, attempts["point"])
        for name, layer in layers.items():
            torch.testing.assert_close(layer.experts, clean[name].experts, rtol=0, atol=0)
            assert (layer.intended.gates[layer.intended.experts == layer.num_experts] == 0).all()
            same_gates = torch.allclose(layer.gates, clean[name].gates, rtol=1e-12, atol=0)
            assert same_gates == (gates == "recorded")
            moved += routing_change(clean[name], free[name])
    assert moved > 0 or kind.startswith("all")  # the free model would have routed otherwise
    prediction = model(result.adversarial).argmax(1)
    assert torch.equal(result.prediction, prediction)
    assert torch.equal(result.success, prediction != labels) and bool(result.success.any())


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "expert choice"])
def test_fresh_gates_are_those_of_the_free_model_where_nothing_moved(images, kind):
    model = vmoe(**MODELS[kind])
    mode = FrozenRouting("fresh")
    attempts = mode.record(model, images)
    with mode.around(model, attempts):
        torch.testing.assert_close(model(images), model(images + 0), rtol=0, atol=0)
        frozen = model(images)
    torch.testing.assert_close(frozen, model(images), rtol=1e-12, atol=1e-12)
    assert (attempts["forwards"] == 1).all()


@pytest.mark.parametrize(
    "mode", [FrozenRouting(), FrozenRouting("fresh"), RoutingDivergence()], ids=str
)
def test_clean_images_are_recorded_as_the_search_shows_them(images, mode):
    model = vmoe()
    attempts, expected = (
        mode.record(model, images, lambda shown: model(1 - shown)),
        mode.record(model, 1 - images),
    )
    assert attempts.keys() == expected.keys() and all(
        torch.equal(attempts[name], expected[name]) for name in attempts
    )
    assert not any(value.requires_grad for value in attempts.values())


def gradients(forward, images, modes, attempts=None):
    """The input gradient of one fixed loss under each mode, and the outputs."""
    found, outputs = [], []
    for mode in modes:
        points = images.clone().requires_grad_()
        with mode.around(forward, {} if attempts is None else attempts):
            output = forward(points)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), **wide)
        found.append(torch.autograd.grad((output * weights).sum(), points)[0])
        outputs.append(output.detach())
    return found, outputs


LAYERS = {
    "top-1": lambda: MoE(6, 10, 4, 1, **wide),
    "top-2": lambda: MoE(6, 10, 4, 2, **wide),
    "top-3 renormalised": lambda: MoE(
        6, 10, 4, 3, router=TopKRouter(6, 4, 3, renormalize=True, **wide), **wide
    ),
    "all": lambda: MoE(6, 10, 4, 4, **wide),
    "scaled": lambda: MoE(6, 10, 4, 2, router=TopKRouter(6, 4, 2, scale=2.5, **wide), **wide),
    "sigmoid, first k": lambda: MoE(
        6, 10, 4, 2, router=TopKRouter(6, 4, 2, score="sigmoid", order="topk_first", **wide), **wide
    ),
    "shared": lambda: MoE(6, 10, 4, 2, shared_dim=5, shared_gate=True, **wide),
    "recompute": lambda: MoE(6, 10, 4, 2, recompute=True, **wide),
    "capacity": lambda: MoE(6, 10, 4, 2, capacity=Capacity(0.5), **wide),
    "capacity, renormalised": lambda: MoE(
        6, 10, 4, 2, capacity=Capacity(0.5, renormalize=True), **wide
    ),
    "expert choice": lambda: MoE(6, 10, 4, router=ExpertChoiceRouter(6, 4, **wide), **wide),
    "ensemble": lambda: MoE(
        6, 10, 4, 2, router=EnsembleRouter(6, 4, 2, ensemble_size=2, **wide), **wide
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_through_gates_and_through_experts_add_up(kind):
    layer = LAYERS[kind]().eval()
    x = torch.randn(6, 5, 6, **wide)
    (full, gates, experts), outputs = gradients(
        layer, x, [RoutingMode(), GatesOnly(), ExpertsOnly()]
    )
    torch.testing.assert_close(gates + experts, full, rtol=0, atol=1e-12)
    assert gates.abs().max() > 1e-3 and experts.abs().max() > 1e-3
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert not layer._forward_pre_hooks and not layer.router._forward_pre_hooks


@pytest.mark.parametrize("kind", LAYERS)
def test_straight_through_is_the_true_layer_forward_and_the_soft_mixture_backward(kind):
    layer = LAYERS[kind]().eval()
    x = torch.randn(6, 5, 6, **wide)
    (straight,), (steered,) = gradients(layer, x, [StraightThrough(0.5)])
    plain = layer(x)
    torch.testing.assert_close(steered, plain, rtol=0, atol=1e-14)

    # the same by hand: every expert dense, gates hard + soft − soft
    points = x.clone().requires_grad_()
    tokens = points.flatten(0, -2)
    routing = routed(layer, x)[""]
    hard = torch.zeros(len(tokens), 5, **wide).scatter_add(
        1, routing.experts.long(), routing.gates
    )[:, :4]
    routed_freely = layer.router(tokens)
    total = routed_freely.routing.gates.detach().sum(1, keepdim=True)
    if kind in ("expert choice", "capacity, renormalised"):  # where nothing is dropped it is 1
        total = torch.ones_like(total)
    soft = total * (routed_freely.logits / 0.5).softmax(-1)
    hidden = torch.einsum("td,efd->tef", tokens, layer.fc1.weight) + layer.fc1.bias
    outputs = (
        torch.einsum("tef,edf->ted", nn.functional.gelu(hidden), layer.fc2.weight) + layer.fc2.bias
    )
    y = ((hard + soft - soft.detach()).unsqueeze(-1) * outputs).sum(1)
    if layer.shared is not None:
        y = y + layer.shared_gate(tokens).sigmoid() * layer.shared(tokens)
    y = y.view(x.shape)
    torch.testing.assert_close(y, plain, rtol=0, atol=1e-12)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), **wide)
    expected = torch.autograd.grad((y * weights).sum(), points)[0]
    torch.testing.assert_close(straight, expected, rtol=0, atol=1e-12)


def test_softened_goes_from_the_best_expert_to_the_average_of_all():
    x = torch.randn(7, 5, 6, **wide)
    layer = LAYERS["capacity"]().eval()
    cold, warm = Softened(1e-4), Softened(1e4)
    with cold.around(layer, {}):
        best_of_all = layer(x)
    with warm.around(layer, {}):
        average = layer(x)
    dropless = copy.deepcopy(layer)
    dropless.capacity = None
    routed = layer.router(x.flatten(0, 1))
    total = routed.routing.gates.sum(1).view(7, 5, 1)
    assert total.min() < 0.9
    with intervene(dropless, AllExperts()):
        torch.testing.assert_close(average, total * dropless(x), rtol=0, atol=1e-3)
    best = routed.logits.argmax(1).view(7, 5)
    for expert in range(4):
        with intervene(dropless, OneExpert(expert, gates="uniform")):
            torch.testing.assert_close(
                best_of_all[best == expert],
                (total * dropless(x))[best == expert],
                rtol=0,
                atol=1e-3,
            )


def test_the_soft_model_has_the_scale_of_the_true_one():
    x = torch.randn(6, 5, 6, **wide)
    for router in (
        TopKRouter(6, 4, 4, scale=2.5, **wide),
        TopKRouter(6, 4, 4, scale=0.3, renormalize=True, **wide),
    ):
        # all experts: the soft model is the true one
        layer = MoE(6, 10, 4, 4, router=router, **wide).eval()
        grads, outputs = gradients(layer, x, [RoutingMode(), Softened(), StraightThrough()])
        for grad, output in zip(grads, outputs, strict=True):
            torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-13)
            torch.testing.assert_close(grad, grads[0], rtol=0, atol=1e-13)
    for options in (
        {"scale": 2.5, "renormalize": True},
        {"score": "sigmoid"},
        {"score": "sigmoid", "scale": 4.0},
    ):
        layer = MoE(6, 10, 4, 3, router=TopKRouter(6, 4, 3, **options, **wide), **wide).eval()
        for name in ("fc1", "fc2"):  # experts alike, but for their biases
            weight = getattr(layer, name).weight.data
            weight.copy_(weight[:1] + 0.1 * weight)
        _, (true, soft) = gradients(layer, x, [RoutingMode(), Softened()])
        assert (soft - true).norm() < 0.15 * true.norm()


class ArgmaxRouter(nn.Module):
    """One expert a token, with a constant weight of 1: no gradient reaches the logits."""

    def __init__(self, dim, num_experts, detach=False):
        super().__init__()
        self.dim, self.num_experts, self.detach = dim, num_experts, detach
        self.weight = nn.Parameter(torch.randn(num_experts, dim))

    def forward(self, x_TD):
        logits_TE = x_TD @ self.weight.T
        experts_T1 = logits_TE.detach().argmax(1, keepdim=True).to(torch.int32)
        gates_T1 = torch.ones(len(x_TD), 1, dtype=x_TD.dtype)
        return RouterOutput(
            Routing(gates_T1, experts_T1), logits_TE.detach() if self.detach else logits_TE
        )


class Masked(nn.Module):
    """Which of two experts an image goes to decides its class. Within each expert there is but a
    faint slope, and it leads away from the boundary between them."""

    def __init__(self, detach=False):
        super().__init__()
        self.moe = MoE(4, 4, 2, 1, activation="relu", router=ArgmaxRouter(4, 2, detach))
        with torch.no_grad():
            self.moe.router.weight.copy_(
                torch.tensor([[1.0, -1.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]])
            )
            for layer in (self.moe.fc1, self.moe.fc2):
                layer.weight.copy_(torch.eye(4).expand(2, 4, 4))
                layer.bias.zero_()
            self.moe.fc2.weight.mul_(-0.01)
            self.moe.fc2.bias.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))

    def forward(self, x):
        return self.moe(x)[:, :2]


def test_straight_through_sees_through_a_router_that_hides_its_gradient():
    model = Masked().double().eval()
    x = torch.rand(64, 4, **wide) * 0.5 + 0.25
    labels = model(x).argmax(1)
    options = {"eps": 0.2, "steps": 20, "random_start": False}
    plain, straight, soft = (
        PGD(model, routing=mode, **options).run(x, labels)
        for mode in (None, StraightThrough(), Softened(0.1))
    )
    within_reach = (x[:, 0] - x[:, 1]).abs() < 0.4  # of the boundary between the experts
    assert 0 < within_reach.sum() < 64
    assert torch.equal(straight.success, within_reach)
    assert plain.success.sum() == 0 < soft.success.sum() <= within_reach.sum()
    with pytest.raises(ValueError, match="needs the gradient of the router's logits"):
        PGD(Masked(detach=True).double(), routing=StraightThrough(), **options).run(x, labels)


def test_the_auxiliary_loss_is_of_the_batch_and_ascended_with_its_weight(images):
    model = vmoe(router={"importance_weight": 1.0})
    labels = model(images).argmax(1)
    losses = {}
    for weight in (0.0, 1.0, 100.0):
        mode, passes = asked(AuxiliaryLoss(weight))
        attack = PGD(model, 0.2, steps=6, early_stop=False, routing=mode, random_start=False)
        assert attack.coupled_by_model_or_loss and attack.images_per_unit(9) == 9
        adversarial = attack(images, labels)
        with aux_loss_in_eval(model):
            model(adversarial)
            losses[weight] = collect_aux_loss(model).item()
        assert all(len(attempts["label"]) == 9 for attempts, _ in passes)
    assert losses[100.0] > losses[0.0] + 0.1
    plain = PGD(
        model, 0.2, steps=6, early_stop=False, random_start=False, routing=AuxiliaryLoss(0.0)
    )
    with AuxiliaryLoss(3.0).around(model, {}) as term:
        model(images)
        expected = 3 * sum(block.mlp.aux_loss for block in model.blocks)
        torch.testing.assert_close(term(), expected)
        assert expected > 0 and expected.requires_grad
    model(images)
    assert collect_aux_loss(model) == 0 and plain.coupled_by_model_or_loss


def divergence_by_hand(model, clean, images, towards):
    """Image by image, layer by layer."""
    members = model.ensemble_size
    values = torch.zeros(len(images), **wide)
    before, now = routed(model, clean), routed(model, images)
    for name in before:
        for r in range(len(images)):
            tokens = []
            for member in range(members):
                n = len(before[name].logits) // (members * len(images))
                start = (member * len(images) + r) * n
                tokens += range(start, start + n)
            for t in tokens:
                own = before[name].logits[t].isfinite()
                p, q = (layers[name].logits[t][own].softmax(0) for layers in (before, now))
                value = (
                    (p * (p / q).log()).sum()
                    if towards == "away"
                    else q[p.argmin() if towards == "weakest" else towards].log()
                )
                values[r] += value / len(tokens) / len(before)
    return values


@pytest.mark.parametrize("towards", ["away", "weakest", 2])
@pytest.mark.parametrize("kind", ["top-2", "capacity", "ensemble"])
def test_the_divergence_is_that_of_each_image(images, kind, towards):
    model = vmoe(**MODELS[kind])
    mode = RoutingDivergence(0.5, towards)
    if kind == "ensemble" and towards == 2:
        with pytest.raises(ValueError, match="whose ensemble members share no expert, got 2"):
            mode.record(model, images)
        return
    clean, points = images[:3], images[3:6].clone().requires_grad_()
    attempts = mode.record(model, clean) | {"label": torch.zeros(3)}
    with mode.around(model, attempts) as term:
        model(points)
    torch.testing.assert_close(
        term(), 0.5 * divergence_by_hand(model, clean, points.detach(), towards)
    )
    for r in range(3):
        grad = torch.autograd.grad(term()[r], points, retain_graph=True)[0].flatten(1).abs().amax(1)
        if kind != "capacity":
            assert grad[r] > 0 and (grad[torch.arange(3) != r] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("towards", ["away", "weakest", 0])
def test_the_divergence_moves_routing_further_than_the_loss_alone(images, towards):
    model = vmoe()
    labels = model(images).argmax(1)
    options = {"eps": 0.2, "steps": 8, "early_stop": False}
    mode = RoutingDivergence(10.0, towards)
    plain, steered = (
        PGD(model, routing=routing, **options)(images, labels) for routing in (None, mode)
    )
    alone = PGD(model, routing=mode, loss=lambda logits, labels: 0 * logits[:, 0], **options)(
        images, labels
    )
    reached = [
        divergence_by_hand(model, images, points, towards).mean()
        for points in (plain, steered, alone)
    ]
    assert min(reached[1:]) > reached[0] + 0.05
    clean, *changed = (routed(model, points) for points in (images, plain, steered))
    if towards == "away":
        moved = [
            sum(routing_change(clean[name], layers[name]) for name in clean) for layers in changed
        ]
        assert moved[1] > moved[0] + 0.05


@pytest.mark.parametrize("mode", EACH_ALONE, ids=str)
def test_the_result_of_an_image_does_not_depend_on_its_company(images, mode):
    model = vmoe()
    # one is misclassified from the start
    labels = (model(images).argmax(1) + (torch.arange(9) == 5)) % 3
    attack = PGD(model, 0.12, steps=3, restarts=2, routing=mode)
    together = attack.run(images, labels)
    assert 0 < together.success.sum() < 8
    order = torch.randperm(9)
    shuffled = attack.run(images[order], labels[order], indices=order)
    back = order.argsort()
    for name in ("success", "steps", "prediction"):
        assert torch.equal(getattr(shuffled, name)[back], getattr(together, name)), name
    torch.testing.assert_close(shuffled.adversarial[back], together.adversarial, rtol=0, atol=1e-9)
    alone = attack.run(images[3:4], labels[3:4], indices=torch.tensor([3]))
    torch.testing.assert_close(alone.adversarial, together.adversarial[3:4], rtol=0, atol=1e-9)
    report = evaluate(
        model, (images, labels), {"PGD": attack}, batch_size=4, checks=False, keep_adversarial=True
    )
    summary = report.attacks["PGD"]
    assert torch.equal(summary.fell, together.success)
    torch.testing.assert_close(
        summary.adversarial[together.success],
        together.adversarial[together.success],
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("mode", [FrozenRouting("fresh"), GatesOnly(), StraightThrough()], ids=str)
def test_whole_groups_are_attacked_where_images_compete(images, mode):
    model = vmoe(**MODELS["capacity"])
    labels = model(images).argmax(1)
    attack = PGD(model, 0.1, steps=4, routing=mode)
    together = attack.run(images, labels)
    for first in range(0, 9, 3):
        part = slice(first, first + 3)
        apart = attack.run(images[part], labels[part], indices=torch.arange(9)[part])
        assert torch.equal(apart.success, together.success[part])
        torch.testing.assert_close(apart.adversarial, together.adversarial[part], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "mode", [FrozenRouting(), RoutingDivergence(1.0, "weakest"), StraightThrough()], ids=str
)
def test_every_pass_is_counted(images, mode):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.images = vmoe(), 0

        def forward(self, x):
            self.images += len(x)
            return self.body(x)

    model = Counting()
    labels = model(images).argmax(1)
    for attack in (
        PGD(model, 0.05, steps=4, restarts=2, routing=mode),
        MIFGSM(model, 0.05, steps=3, routing=mode),
        FGSM(model, routing=mode),
    ):
        model.images = 0
        result = attack.run(images, labels)
        assert result.forwards.sum() == model.images, attack


@pytest.mark.parametrize("mode", [RoutingMode(), *EACH_ALONE, AuxiliaryLoss()], ids=str)
def test_modes_say_how_their_search_differs_from_the_free_model(images, mode):
    model = vmoe(router={"importance_weight": 1.0})
    attempts = mode.record(model, images) | {"label": torch.zeros(9)}
    with mode.around(model, attempts) as term:
        forward = model(images.flip(0))  # of other images than those on record
    assert mode.free_forward == torch.allclose(forward, model(images.flip(0)), rtol=0, atol=1e-12)
    assert mode.adds_term == (term is not None)
    assert mode.coupled_by_loss == isinstance(mode, AuxiliaryLoss)


@pytest.mark.parametrize("mode", [*EACH_ALONE, AuxiliaryLoss()], ids=str)
def test_nothing_moves_at_eps_0_and_on_a_constant_model(images, mode):
    model = vmoe()
    labels = model(images).argmax(1)
    result = PGD(model, 0.0, steps=3, routing=mode).run(images, labels)
    assert torch.equal(result.adversarial, images) and not result.success.any()
    nn.init.zeros_(model.head.weight)
    constant = PGD(model.float(), 0.1, steps=3, early_stop=False, routing=mode).run(
        images.float(), torch.zeros_like(labels)
    )
    assert (
        constant.adversarial.isfinite().all()
        and not constant.success.any()
        and constant.clean_correct.all()
    )


class Twice(nn.Module):
    """One MoE layer that runs two times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.moe = LAYERS["top-2"]().eval()

    def forward(self, x):
        return self.moe(self.moe(x))


def test_numbers_of_experts_may_come_from_numpy():
    for number in (np.int64(1), torch.tensor(1)):
        mode = RoutingDivergence(1.0, number)
        assert mode == RoutingDivergence(1.0, 1) and type(mode.towards) is int


def test_what_cannot_work_is_refused(images):
    dense = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    soft = vmoe(make_moe=lambda: SoftMoE(12, 16, 4, activation="gelu_tanh"))
    for mode in EACH_ALONE:
        with pytest.raises(
            ValueError,
            match="model must have MoE layers for an attack on its routing, got Sequential with "
            "none",
        ):
            PGD(dense, 0.1, steps=1, routing=mode).run(images, dense(images).argmax(1))
        with pytest.raises(
            ValueError,
            match=r"model must choose experts .* got VMoE with Soft MoE, .* no choice to freeze "
            r"or to divert",
        ):
            PGD(soft, 0.1, steps=1, routing=mode).run(images, soft(images).argmax(1))
    for mode in (FrozenRouting(), RoutingDivergence()):
        with pytest.raises(ValueError, match="run once in a forward pass, but 'moe' ran 2 times"):
            PGD(Twice(), 0.1, steps=1, routing=mode).run(
                images[:, 0, 0], Twice()(images[:, 0, 0]).argmax(1)
            )
    with pytest.raises(
        ValueError, match=r"towards must be below the 4 experts of 'blocks\.0\.mlp', got 4"
    ):
        PGD(vmoe(), 0.1, steps=1, routing=RoutingDivergence(1.0, 4)).run(
            images, vmoe()(images).argmax(1)
        )
    for make, message in (
        (lambda: FrozenRouting("kept"), 'gates must be "recorded" or "fresh", got \'kept\''),
        (lambda: StraightThrough(0), "temperature must be finite and above 0, got 0"),
        (lambda: Softened(float("inf")), "temperature must be finite and above 0, got inf"),
        (lambda: RoutingDivergence(float("nan")), "weight must be finite, got nan"),
        (lambda: AuxiliaryLoss(float("-inf")), "weight must be finite, got -inf"),
        (
            lambda: RoutingDivergence(1.0, "best"),
            'towards must be "away", "weakest" or the number of an expert, got \'best\'',
        ),
        (lambda: RoutingDivergence(1.0, -1), "or the number of an expert, got -1"),
        (lambda: RoutingDivergence(1.0, True), "or the number of an expert, got True"),
        (lambda: RoutingDivergence(1.0, 1.0), r"or the number of an expert, got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(
        TypeError,
        match="routing must be None or one mode at a time, such as FrozenRouting\\(\\), got str",
    ):
        PGD(dense, routing="frozen")
