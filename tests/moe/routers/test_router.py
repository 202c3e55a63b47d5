import copy
import pickle

import pytest
import torch

from ironmoe.kernels import ExpertGroups
from ironmoe.moe import (
    MoE,
    TopKRouter,
    aux_loss_in_eval,
    balance_loss,
    collect_aux_loss,
    importance_loss,
    load_loss,
    router_z_loss,
)

D, E, K, T = 8, 6, 2, 30


def test_injected_noise_is_the_noise():
    router = TopKRouter(D, E, K, noise_std=1.5, importance_weight=0, load_weight=1.0)
    x, noise = torch.randn(T, D), torch.randn(T, E)
    router.noise = noise
    routing, logits, aux_loss, _ = router(x)
    noisy = logits + noise * 1.5 / E
    torch.testing.assert_close(routing.gates, noisy.softmax(-1).topk(K).values)
    torch.testing.assert_close(aux_loss, load_loss(logits, noisy, 1.5 / E, K))
    assert torch.equal(router(x).routing.gates, routing.gates)
    assert copy.deepcopy(router).noise is None and pickle.loads(pickle.dumps(router)).noise is None
    router.noise = noise[1:]
    with pytest.raises(
        ValueError, match=r"noise must have the shape of the logits, \(30, 6\), got \(29, 6\)"
    ):
        router(x)
    router.noise = None
    assert not torch.equal(router(x).routing.gates, router(x).routing.gates)


@pytest.mark.parametrize("size", [10, 7, 30, 100, None])
def test_auxiliary_loss_is_the_mean_over_groups(size):
    """Also where the last group is smaller."""
    weights = {
        "importance_weight": 0.3,
        "load_weight": 0.2,
        "balance_weight": 0.7,
        "z_weight": 0.05,
    }
    router = TopKRouter(D, E, K, **weights)
    x, noise = torch.randn(T, D), torch.randn(T, E)
    router.noise = noise
    logits = x @ router.weight.T
    noisy = logits + noise / E
    expected = [
        0.3 * importance_loss(z.softmax(-1))
        + 0.2 * load_loss(z, n, 1 / E, K)
        + 0.7 * balance_loss(n.softmax(-1))
        + 0.05 * router_z_loss(z)
        for z, n in zip(logits.split(size or T), noisy.split(size or T), strict=True)
    ]
    torch.testing.assert_close(router(x, size).aux_loss, torch.stack(expected).mean())
    router.eval()
    assert router(x, size).aux_loss is None
    with aux_loss_in_eval(router):
        in_eval = router(x, size).aux_loss
    expected = [
        0.3 * importance_loss(z.softmax(-1))
        + 0.7 * balance_loss(z.softmax(-1))
        + 0.05 * router_z_loss(z)
        for z in logits.split(size or T)
    ]
    torch.testing.assert_close(in_eval, torch.stack(expected).mean())
    assert router(x, size).aux_loss is None


@pytest.mark.parametrize(("weight", "tokens"), [(0.0, 9), (0.005, 0)])
def test_a_loss_that_is_a_constant_warns_of_no_lost_gradient(weight, tokens, recwarn):
    """No weight, or no token: there is nothing that a gradient could change."""
    router = TopKRouter(D, E, K, importance_weight=weight, load_weight=weight)
    layer = MoE(D, 10, E, router=router)
    layer(torch.randn(tokens, D, requires_grad=True))
    assert collect_aux_loss(layer) == 0 and not recwarn


def test_selection_bias_evens_out_a_skewed_load():
    """No loss, no gradient: only the bias moves, and gates never see it."""
    torch.manual_seed(0)
    router = TopKRouter(
        D,
        E,
        K,
        score="sigmoid",
        selection_bias=True,
        noise_std=0,
        importance_weight=0,
        load_weight=0,
    )
    x = torch.randn(2000, D) + 1
    router.weight.data[0] += 0.5

    def imbalance():
        experts = router.eval()(x).routing.experts
        load = torch.bincount(experts.flatten(), minlength=E).float()
        return (load.max() / load.mean()).item()

    before = imbalance()
    for rate in [0.02] * 100 + [0.002] * 100:
        router.train()(x)
        assert router.choices[:E].sum() == 2000 * K
        router.update_selection_bias(rate)
        assert not router.choices.any()
    assert before > 1.5 and imbalance() < 1.05
    gates, experts = router.eval()(x).routing
    torch.testing.assert_close(gates, (x @ router.weight.T).sigmoid().gather(1, experts.long()))
    assert "selection_bias" in router.state_dict() and "choices" not in router.state_dict()
    one_step = router.selection_bias.clone()
    router.train()(x)
    load = router.choices[:E].float()
    router.update_selection_bias(0.5)
    torch.testing.assert_close(router.selection_bias, one_step + 0.5 * (load.mean() - load).sign())
    with pytest.raises(ValueError, match="selection_bias=True"):
        TopKRouter(D, E).update_selection_bias()


def test_jitter_is_in_training_only():
    router = TopKRouter(D, E, K, jitter=0.1, noise_std=0)
    x = torch.randn(T, D)
    assert not torch.equal(router(x).logits, router(x).logits)
    assert (
        router(x).logits - x @ router.weight.T
    ).abs().max() < 0.1 * x.abs().max() * router.weight.abs().sum(1).max()
    assert torch.equal(router.eval()(x).logits, torch.nn.functional.linear(x, router.weight))


def test_softcap_and_bias():
    router = TopKRouter(D, E, K, softcap=0.5, bias=True).eval()
    torch.nn.init.normal_(router.bias)
    x = 3 * torch.randn(T, D)
    torch.testing.assert_close(
        router(x).logits, 0.5 * ((x @ router.weight.T + router.bias) / 0.5).tanh()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True},
        {"renormalize": 2.0, "scale": 3.0},
        {"order": "topk_first", "score": "sigmoid"},
    ],
)
def test_gates_of_the_own_choice_are_the_gates(options):
    router = TopKRouter(D, E, K, **options).eval()
    (gates, experts), logits, *_ = router(torch.randn(T, D))
    torch.testing.assert_close(router.gates_of(logits, experts), gates)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "score": "sigmoid",
            "selection_bias": True,
            "groups": ExpertGroups(3, 2),
            "renormalize": True,
            "scale": 2.5,
        },
        {"order": "topk_first", "bias": True},
        {"score": "sqrtsoftplus", "softcap": 3.0, "renormalize": 1.0},
    ],
)
class TestEveryKind:
    def test_state_copies_and_devices(self, options):
        router = TopKRouter(D, E, K, **options).eval()
        x = torch.randn(T, D)
        expected = router(x).routing.gates
        for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
            assert torch.equal(twin(x).routing.gates, expected)
        fresh = TopKRouter(D, E, K, **options, device="meta").to_empty(device="cpu")
        fresh.reset_parameters()
        assert all(not buffer.any() for buffer in fresh.buffers()) and fresh.weight.any()
        fresh.load_state_dict(router.state_dict())
        assert torch.equal(fresh.eval()(x).routing.gates, expected)

    def test_compiled_training_step(self, options):
        router = TopKRouter(D, E, K, **options, noise_std=0.0, balance_weight=0.1)
        x = torch.randn(T, D)
        torch._dynamo.reset()
        ours, expected = (
            torch.compile(router, backend="aot_eager", fullgraph=True)(x, 10),
            router(x, 10),
        )
        torch.testing.assert_close(ours.routing, expected.routing)
        torch.testing.assert_close(ours.aux_loss, expected.aux_loss)
        gradients = [
            torch.autograd.grad(o.aux_loss + o.routing.gates.sum(), router.weight)
            for o in (ours, expected)
        ]
        torch.testing.assert_close(*gradients)

    def test_low_precision_and_autocast(self, options):
        router = TopKRouter(D, E, K, **options, dtype=torch.bfloat16).eval()
        x = torch.randn(T, D, dtype=torch.bfloat16)
        routing, logits, *_ = router(x)
        assert routing.gates.dtype == logits.dtype == torch.float32
        wide = TopKRouter(D, E, K, **options).eval()
        wide.load_state_dict(router.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            assert (
                torch.equal(wide(x.float()).logits, wide(x.float()).logits)
                and wide(x.float()).logits.dtype == torch.float32
            )
        torch.testing.assert_close(logits, wide(x.float()).logits)

    def test_no_token_and_one(self, options):
        for training in (True, False):
            router = TopKRouter(D, E, K, **options).train(training)
            for tokens in (0, 1):
                routing, _, aux_loss, _ = router(torch.randn(tokens, D))
                assert routing.gates.shape == (tokens, K) and (
                    aux_loss is None or aux_loss.isfinite()
                )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": 1.0}, "jitter must be at least 0 and below 1"),
        ({"softcap": 0.0}, "softcap must be above 0 or None"),
        ({"renormalize": -1.0}, "renormalize must be True, False or the p > 0 of a norm"),
        ({"score": "tanh"}, "score must be one of"),
        ({"order": "both"}, "order must be one of"),
        ({"groups": ExpertGroups(4, 2)}, "groups must split the 6 experts evenly"),
        ({"groups": ExpertGroups(6, 1)}, "top_k must be from 1 to 1"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(D, E, K, **options)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_shared_experts(gate, activation):
    layer = MoE(D, 10, E, K, activation=activation, shared_dim=12, shared_gate=gate).eval()
    routed = MoE(D, 10, E, K, activation=activation).eval()
    routed.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if not name.startswith("shared")}
    )
    x = torch.randn(2, 5, D)
    shared = layer.shared(x)
    if gate:
        shared = torch.sigmoid(x @ layer.shared_gate.weight.T) * shared
    torch.testing.assert_close(layer(x), routed(x) + shared)
    layer.train()
    (layer(x).sum() + collect_aux_loss(layer)).backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_shared_experts_are_those_of_qwen2_moe():
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    config = transformers.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=10,
        shared_expert_intermediate_size=12,
        num_experts=E,
        num_experts_per_tok=K,
    )
    config._experts_implementation = "eager"
    block = Qwen2MoeSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer = MoE(
        D, 10, E, K, activation="swiglu", bias=False, shared_dim=12, shared_gate=True
    ).eval()
    with torch.no_grad():
        for ours, theirs in (
            (layer.router.weight, block.gate.weight),
            (layer.fc1.weight, block.experts.gate_up_proj),
            (layer.fc2.weight, block.experts.down_proj),
            (layer.shared.fc2.weight, block.shared_expert.down_proj.weight),
            (
                layer.shared.fc1.weight,
                torch.cat(
                    [block.shared_expert.gate_proj.weight, block.shared_expert.up_proj.weight]
                ),
            ),
            (layer.shared_gate.weight, block.shared_expert_gate.weight),
        ):
            ours.copy_(theirs)
    x = torch.randn(2, 7, D, requires_grad=True)
    y, twin = layer(x), block(x)
    twin = twin[0] if isinstance(twin, tuple) else twin  # until transformers 5.17
    torch.testing.assert_close(y, twin, rtol=1e-5, atol=1e-5)
    (ours,), (expected,) = (torch.autograd.grad(z.square().sum(), [x]) for z in (y, twin))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_bad_shared_experts_are_named():
    for options in ({"shared_dim": -1}, {"shared_gate": True}):
        with pytest.raises(ValueError, match="shared_dim must be at least 0"):
            MoE(D, 10, E, **options)
