"""Experts' weights under the libraries and hooks of other people's training."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ironmoe.moe import ExpertLinear, MoE, SoftMoE, TopKRouter, VMoE, collect_aux_loss
from ironmoe.moe.metrics import expert_outputs

DIM, EXPERTS = 8, 4
LAYERS = {
    "moe": lambda: MoE(DIM, 16, EXPERTS),
    "shared, gated": lambda: MoE(
        DIM, 16, EXPERTS, activation="swiglu", shared_dim=8, shared_gate=True
    ),
    "rounded": lambda: MoE(DIM, 16, EXPERTS, dispatch_dtype=torch.bfloat16),
    "recomputed": lambda: MoE(DIM, 16, EXPERTS, recompute=True),
    "soft": lambda: SoftMoE(DIM, 16, EXPERTS, 2),
}


def model(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, DIM), LAYERS[kind](), nn.Linear(DIM, 3)).eval()


def images(seed=1):
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(seed))


def step(net, optimizer):
    optimizer.zero_grad()
    (net(images()).square().mean() + collect_aux_loss(net)).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_on_experts_run_once_a_pass_and_see_the_weights_used(kind):
    net, calls = model(kind), []
    for name in ("fc1", "fc2"):
        layer = getattr(net[1], name)
        layer.register_forward_pre_hook(lambda m, args: calls.append(("before", args[0].shape[-1])))
        layer.register_forward_hook(lambda m, args, y: calls.append(("after", y.shape[-1])))
        layer.register_full_backward_hook(lambda m, dx, dy: calls.append(("grad", len(dy))))
    net(images()).sum().backward()
    assert sorted(calls) == sorted([("before", DIM), ("after", DIM), ("grad", 1)] * 2)

    def double(layer, _):
        layer.weight.data.mul_(2)

    doubled, net = model(kind), model(kind)
    net[1].fc2.register_forward_pre_hook(double)
    with torch.no_grad():
        doubled[1].fc2.weight.mul_(2)
        torch.testing.assert_close(net(images()), doubled(images()), rtol=0, atol=0)


def expected_by_parametrization(net, name, make):
    """The same model whose weight is the parametrized one, as a plain number."""
    parametrized, plain = copy.deepcopy(net), copy.deepcopy(net)
    layer = getattr(parametrized[1], name)
    make(layer)
    with torch.no_grad():
        getattr(plain[1], name).weight.copy_(layer.weight)
    return parametrized, plain


NORMS = {
    "weight norm, old": torch.nn.utils.weight_norm,
    "spectral norm, old": torch.nn.utils.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune a whole column": lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, dim=2),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["fc1", "fc2"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["moe", "soft"])
def test_weights_that_hooks_or_parametrizations_make_are_used_and_trained(kind, norm, name):
    parametrized, plain = expected_by_parametrization(model(kind), name, NORMS[norm])
    if "spectral" not in norm:  # it divides by an estimate that changes with each pass
        torch.testing.assert_close(parametrized(images()), plain(images()))
    optimizer = torch.optim.SGD(parametrized.parameters(), 0.1)
    parametrized.train()
    before = [p.clone() for p in parametrized[1].parameters()]
    for _ in range(3):
        step(parametrized, optimizer)
    changed = [not p.equal(b) for p, b in zip(parametrized[1].parameters(), before, strict=True)]
    assert all(changed)


def test_a_parametrization_of_the_users_is_used():
    class Zero(nn.Module):
        def forward(self, weight):
            return weight * 0

    net = model("moe")
    parametrize.register_parametrization(net[1].fc2, "weight", Zero())
    net[1].fc2.bias.data.zero_()
    expected = net[2].bias.expand(2, 5, 3)
    torch.testing.assert_close(net(images()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_peft_adapts_experts_and_merges_them(kind):
    peft = pytest.importorskip("peft")
    net = model(kind)
    before = net(images())
    config = peft.LoraConfig(
        r=2, target_modules=["2"], target_parameters=["1.fc1.weight", "1.fc2.weight"]
    )
    adapted = peft.get_peft_model(net, config)
    torch.testing.assert_close(adapted(images()), before)
    adapted(images()).square().sum().backward()
    lora = [(n, p) for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(lora) == 3 and all(p.grad.abs().sum() > 0 for _, p in lora)
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if "lora" not in n)

    with torch.no_grad():
        for _, parameter in lora:
            nn.init.normal_(parameter)
    trained = adapted(images())
    assert not torch.allclose(trained, before)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(images()), before)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(images()), trained, rtol=1e-4, atol=1e-4)
    assert type(merged[1].fc1) is ExpertLinear


@pytest.mark.parametrize("kind", ["top_k", "expert choice", "with a capacity"])
def test_peft_trains_a_copy_of_a_router_and_the_layer_knows_what_it_is(kind):
    peft = pytest.importorskip("peft")
    from ironmoe.moe import Capacity, ExpertChoiceRouter

    makes = {
        "top_k": lambda: MoE(DIM, 16, EXPERTS),
        "expert choice": lambda: MoE(
            DIM, 16, EXPERTS, router=ExpertChoiceRouter(DIM, EXPERTS, images_per_group=1)
        ),
        "with a capacity": lambda: MoE(
            DIM, 16, EXPERTS, capacity=Capacity(0.5, images_per_group=1, multiple_of=1)
        ),
    }
    torch.manual_seed(0)
    net = nn.Sequential(makes[kind](), nn.Linear(DIM, 3)).eval()
    before = net(images())
    config = peft.LoraConfig(r=2, target_modules=["1"], modules_to_save=["0.router"])
    adapted = peft.get_peft_model(net, config)
    torch.testing.assert_close(adapted(images()), before, rtol=0, atol=0)
    compiled = copy.deepcopy(adapted)
    adapted.train()
    (adapted(images()).square().sum() + collect_aux_loss(adapted)).backward()
    saved = [p for n, p in adapted.named_parameters() if "modules_to_save" in n]
    assert len(saved) == 1 and saved[0].grad.abs().sum() > 0

    layer = compiled.base_model.model[0].eval()
    layer.router = torch.compile(layer.router, backend="eager")
    torch.testing.assert_close(compiled(images()), before, rtol=0, atol=0)


VITS = {
    "token": {},
    "map head": {"classifier": "map", "representation_size": 12},
    "soft": {"classifier": "gap", "make_moe": lambda: SoftMoE(16, 32, 4, activation="gelu_tanh")},
    "ensemble": {"ensemble_size": 2},
}


def vit(kind):
    torch.manual_seed(0)
    net = VMoE(8, 4, 16, 2, 2, 32, 3, "last 1", 4, channels=1, **VITS[kind]).eval()
    nn.init.normal_(net.head.weight)
    return net


@pytest.mark.parametrize("kind", VITS)
def test_accelerate_offloads_every_weight(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pictures = torch.rand(3, 1, 8, 8)
    expected = vit(kind)(pictures)
    for offload in (
        lambda net: accelerate.cpu_offload(net, execution_device="cpu"),
        lambda net: accelerate.disk_offload(net, str(tmp_path), execution_device="cpu"),
    ):
        net = vit(kind)
        offload(net)
        assert all(parameter.is_meta for parameter in net.parameters())
        with torch.no_grad():
            torch.testing.assert_close(net(pictures), expected, rtol=0, atol=0)


def test_accelerate_trains_with_gradient_accumulation():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = model("moe").train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net, optimizer = accelerator.prepare(net, optimizer)
    before = [p.clone() for p in net.parameters()]
    for seed in range(2):
        with accelerator.accumulate(net):
            loss = net(images(seed)).square().mean() + collect_aux_loss(net)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert all(not p.equal(b) for p, b in zip(net.parameters(), before, strict=True))


def test_numbers_of_experts_are_those_of_the_weights_in_use():
    net = model("moe")
    x = images().flatten(0, 1)
    prune.random_unstructured(net[1].fc2, "weight", 1.0)
    net[1].fc2.bias.data.zero_()
    assert (expert_outputs(net[1], x) == 0).all()


def test_a_module_around_experts_that_casts_is_followed():
    """As mixed precision of FSDP2 does: the wrapper casts its argument and its weights."""

    class Halved(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner.bfloat16()

        def forward(self, x, use):
            return self.inner(x.bfloat16(), use)

    net = model("moe")
    exact = net(images())
    net[1].fc1, net[1].fc2 = Halved(net[1].fc1), Halved(net[1].fc2)
    y = net[1](net[0](images()))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(net[2](y.float()), exact, rtol=0, atol=0.1)


def test_a_router_in_training_keeps_its_loss_with_adapters():
    peft = pytest.importorskip("peft")
    router = TopKRouter(DIM, EXPERTS, 2, noise_std=0, importance_weight=1.0, load_weight=0)
    net = nn.Sequential(MoE(DIM, 16, EXPERTS, router=router), nn.Linear(DIM, 3)).train()
    expected = router(images().flatten(0, 1)).aux_loss
    config = peft.LoraConfig(r=2, target_modules=["1"], target_parameters=["0.fc1.weight"])
    adapted = peft.get_peft_model(net, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = adapted(images())
        torch.testing.assert_close(collect_aux_loss(adapted), expected)
    assert y.requires_grad


def test_a_wrapper_that_nobody_knows_leaves_a_router_by_groups_what_it_is():
    from ironmoe.moe import ExpertChoiceRouter

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    router = ExpertChoiceRouter(DIM, EXPERTS, images_per_group=1)
    net = MoE(DIM, 16, EXPERTS, router=router).eval()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    for given in ((images(),), (images(), mask)):
        expected = net(*given)
        net.router = Around(Around(router))
        torch.testing.assert_close(net(*given), expected, rtol=0, atol=0)
        net.router = router
