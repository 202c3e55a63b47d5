import copy
import subprocess
import sys

import pytest
import torch

from ironmoe.kernels import ACTIVATIONS
from ironmoe.moe import (
    MoE,
    TopKRouter,
    VMoE,
    balance_loss,
    collect_aux_loss,
    freeze_weights,
    importance_loss,
    load_loss,
    router_z_loss,
    routing_iou,
    trace_routing,
    upcycle,
)

GATES = torch.tensor([[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0.0]])


def test_losses_equal_the_values_of_the_official_tests():
    torch.testing.assert_close(balance_loss(GATES), torch.tensor(1.0875))
    torch.testing.assert_close(importance_loss(GATES), torch.tensor(0.03874999))
    logits = torch.tensor([[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]])
    noise = torch.tensor(
        [[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]
    )
    torch.testing.assert_close(
        load_loss(logits, logits + noise, 0.1, 2), torch.tensor(0.48573864536489236)
    )
    torch.testing.assert_close(router_z_loss(torch.zeros(3, 4)), torch.tensor(4.0).log() ** 2)


@pytest.mark.parametrize("loss", [importance_loss, balance_loss, router_z_loss])
def test_losses_have_right_and_finite_gradients(loss):
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: loss(z if loss is router_z_loss else z.softmax(-1)), logits
    )
    even = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(even if loss is router_z_loss else even.softmax(-1)), even)
    assert grad.isfinite().all()


def test_load_loss_needs_noise():
    with pytest.raises(ValueError, match="noise_std must be above 0"):
        load_loss(torch.zeros(2, 2), torch.zeros(2, 2), 0.0, 1)


def by_hand(layer, x):
    """The layer token by token, for GELU without gating."""
    y = torch.zeros_like(x)
    for t, token in enumerate(x):
        probabilities = (layer.router.weight @ token).softmax(0)
        for e in sorted(range(layer.num_experts), key=lambda e: -probabilities[e].item())[
            : layer.router.top_k
        ]:
            hidden = torch.nn.functional.gelu(layer.fc1.weight[e] @ token + layer.fc1.bias[e])
            y[t] += probabilities[e] * (layer.fc2.weight[e] @ hidden + layer.fc2.bias[e])
    return y


def test_moe_by_hand_for_any_leading_shape():
    layer = MoE(6, 10, 5, 2, dtype=torch.float64).eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x.view(6, 6)).view(2, 3, 6))
    assert layer(torch.zeros(0, 6, dtype=torch.float64)).shape == (0, 6)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_parameter_shapes(act):
    layer = MoE(6, 10, 4, activation=act, bias=False)
    wide = 20 if ACTIVATIONS[act].gated else 10
    assert {k: tuple(v.shape) for k, v in layer.named_parameters()} == {
        "router.weight": (4, 6),
        "fc1.weight": (4, wide, 6),
        "fc2.weight": (4, 6, 10),
    }
    assert layer(torch.randn(3, 6)).shape == (3, 6)


def test_aux_loss_is_there_in_training_only_and_reaches_the_router():
    layer = MoE(6, 10, 4)
    layer(torch.randn(9, 6))
    loss = collect_aux_loss(layer)
    loss.backward()
    assert loss > 0 and layer.router.weight.grad.abs().sum() > 0
    layer.eval()(torch.randn(9, 6))
    assert layer.aux_loss is None and collect_aux_loss(layer) == 0


@pytest.mark.parametrize("num_experts", [1, 2])
def test_few_experts_have_finite_losses_and_gradients(num_experts):
    layer = MoE(6, 10, num_experts, top_k=1)
    (layer(torch.randn(9, 6)).sum() + collect_aux_loss(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_noise_is_in_training_only_and_scaled_by_the_number_of_experts():
    router = TopKRouter(4, 8, 8, noise_std=2.0)
    # all logits 0: log-gates differ by the noise alone, with variance 2 · (2 / 8)²
    x = torch.zeros(4000, 4)
    gates, experts = router(x).routing
    log_gates = torch.zeros(4000, 8).scatter_(1, experts.long(), gates.log())
    spread = (log_gates[:, 0] - log_gates[:, 1]).std().item()
    assert abs(spread / (2**0.5 * 0.25) - 1) < 0.06
    assert torch.equal(
        router.eval()(x).routing.experts, torch.arange(8, dtype=torch.int32).expand(4000, 8)
    )


def test_copies_and_pickles_after_a_training_forward():
    import pickle

    layer = MoE(6, 10, 4)
    layer(torch.randn(9, 6))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.aux_loss is None
        assert all(
            torch.equal(a, b) for a, b in zip(copied.parameters(), layer.parameters(), strict=True)
        )


def test_meta_device_and_dtype():
    layer = MoE(6, 10, 4, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoE(6, 10, 4, top_k=5), "top_k must be from 1 to num_experts = 4, got 5"),
        (lambda: MoE(6, 10, 4, top_k=0), "top_k must be from 1"),
        (lambda: MoE(6, 0, 4), "hidden_dim must be at least 1"),
        (lambda: MoE(6, 10, 0), "num_experts"),
        (lambda: MoE(6, 10, 4, activation="mish"), "activation must be one of"),
        (lambda: TopKRouter(6, 4, noise_std=-1), "noise_std must be at least 0"),
        (lambda: MoE(6, 10, 4)(torch.zeros(3, 7)), "x must have 6 features"),
        (lambda: MoE(6, 10, 4)(torch.full((3, 6), float("nan"))), "logits must not be NaN"),
        (lambda: VMoE(28, 8, 32, 2, 4, 64, 10), "patch_size must divide image_size"),
        (lambda: VMoE(28, 6, 32, 2, 4, 64, 10, stem="conv"), "power of two"),
        (lambda: VMoE(28, 7, 32, 2, 5, 64, 10), "heads must divide"),
        (lambda: VMoE(28, 7, 32, 2, 4, 64, 10, moe_layers=(2,)), "moe_layers must be"),
        (lambda: VMoE(28, 7, 32, 2, 4, 64, 10, classifier="mean"), "classifier must be one of"),
        (lambda: VMoE(28, 7, 32, 2, 4, 64, 10, stem="x"), "stem must be one of"),
        (
            lambda: VMoE(28, 7, 32, 2, 4, 64, 10, channels=1)(torch.zeros(2, 3, 28, 28)),
            "images must have shape",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def small_vmoe(**options):
    return VMoE(
        16, 4, 32, 3, 4, 64, 5, **{"moe_layers": (1, -1), "num_experts": 4, "channels": 1} | options
    )


@pytest.mark.parametrize(
    "options", [{}, {"moe_layers": ()}, {"stem": "conv"}, {"classifier": "gap"}]
)
def test_every_parameter_of_a_vit_gets_a_gradient(options):
    model = small_vmoe(**options)
    torch.nn.init.normal_(model.head.weight)
    (model(torch.rand(16, 1, 16, 16)).square().sum() + collect_aux_loss(model)).backward()
    assert [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []
    experts = sum(isinstance(m, MoE) for m in model.modules())
    assert experts == (0 if options.get("moe_layers") == () else 2)


def test_images_of_a_batch_do_not_influence_each_other():
    model = small_vmoe().double().eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.rand(6, 1, 16, 16, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(model(images)[order], model(images[order]))
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_trace_records_each_layer_and_leaves_no_hook():
    model = small_vmoe().eval()
    with trace_routing(model) as trace:
        model(torch.rand(3, 1, 16, 16))
        model(torch.rand(2, 1, 16, 16))
    assert list(trace.layers) == ["blocks.1.mlp", "blocks.2.mlp"]
    layer = trace.layers["blocks.1.mlp"]
    assert layer.gates.shape == layer.experts.shape == (5 * 17, 2) and layer.logits.shape == (
        5 * 17,
        4,
    )
    assert not layer.gates.requires_grad
    torch.testing.assert_close(layer.load().sum(), torch.tensor(1.0))
    torch.testing.assert_close(layer.logits.softmax(1).gather(1, layer.experts.long()), layer.gates)
    model(torch.rand(1, 1, 16, 16))
    assert layer.gates.shape[0] == 5 * 17
    with pytest.raises(RuntimeError, match="stop"), trace_routing(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks for m in model.modules())


def test_routing_iou_is_that_of_the_paper():
    """The worked example of the official attacks_test.py: (1 + 0.75 + 0.5 + 0.25 + 0 + 0) / 2 =
    1.25, from weights > 0."""
    a = torch.tensor(
        [
            [[0, 0, 0.2, 0.4], [0.1, 0.2, 0.3, 0]],
            [[0, 0.2, 0.3, 0], [0.5, 0.5, 0.3, 0.4]],
            [[0] * 4, [0] * 4],
        ]
    )
    b = torch.tensor(
        [
            [[0, 0, 0.4, 0.8], [0.1, 0.2, 0.3, 0.1]],
            [[0, 0.3, 0, 0], [0.1, 0, 0, 0]],
            [[0] * 4, [0] * 4],
        ]
    )

    def chosen(weights):
        return torch.where(weights > 0, torch.arange(4), 4).view(-1, 4)

    iou = routing_iou(chosen(a), chosen(b), 4)
    torch.testing.assert_close(iou, torch.tensor([1, 0.75, 0.5, 0.25, 0, 0]))
    torch.testing.assert_close(iou.sum() / 2, torch.tensor(1.25))


def test_freeze_restores_each_flag_after_an_exception():
    model = small_vmoe()
    model.head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), freeze_weights(model):
        assert not any(p.requires_grad for p in model.parameters())
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


def test_imports_are_light():
    heavy = "{'triton', 'transformers', 'matplotlib', 'sklearn', 'typer', 'rich'}"
    light = (
        "ironmoe.moe, ironmoe.moe.adapters.huggingface, "
        "ironmoe.moe.adapters.huggingface_routing, ironmoe.attacks"
    )
    code = (
        f"import sys, {light}; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & "
        "set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [TopKRouter(8, 4), [("renormalize", True)], "softmax"], ids=str)
def test_a_model_takes_the_arguments_of_its_routers_as_a_dict(given):
    """One router for several layers would be shared by them."""
    sizes = {"dim": 8, "depth": 2, "heads": 2, "mlp_dim": 16, "num_classes": 3}
    makes = {
        "VMoE": lambda router: VMoE(8, 4, **sizes, moe_layers="all", router=router),
        "dense": lambda router: VMoE(8, 4, **sizes, router=router),
        "named": lambda router: VMoE.from_config("V-MoE-S/32", num_experts=4, router=router),
        "upcycle": lambda router: upcycle(VMoE(8, 4, **sizes), 4, router=router),
        "timm": lambda router: MoE.as_mlp_layer(4, router=router),
    }
    for make in makes.values():
        with pytest.raises(TypeError, match="router must be a dict of TopKRouter's arguments"):
            make(given)

    options = {"balance": "mixtral", "balance_weight": 0.01}
    model = makes["VMoE"](options)
    assert all(block.mlp.router.balance == "mixtral" for block in model.blocks)
    assert makes["VMoE"](None).blocks[0].mlp.router.balance == "gshard"


def test_a_layer_takes_its_router_as_a_module():
    with pytest.raises(TypeError, match="router must be a module, such as a TopKRouter, or None"):
        MoE(8, 16, 4, router={"renormalize": True})
