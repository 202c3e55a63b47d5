"""Router health: its numbers against a trace in float64, and what counting costs."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
import twins
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from two_processes import run_in_two_processes

from ironmoe.moe import (
    Capacity,
    EnsembleRouter,
    ExpertChoiceRouter,
    MoE,
    RouterHealth,
    TopKRouter,
    intervene,
    trace_routing,
    upcycle,
)
from ironmoe.moe.metrics import dormant_experts, entropy, imbalance, routing_entropy
from ironmoe.moe.policies import DropRank, OneExpert

D, F, E = 6, 10, 4
KEYS = [
    "load_imbalance", "dead_experts", "load_entropy", "drop_share", "unrouted_share", "gate_mass",
    "router_entropy", "token_entropy", "max_logit",
]  # fmt: skip


def numbers_of(layer):
    """What the health of a layer should be, from its trace."""
    load = layer.load().double()
    chosen = layer.intended.experts < layer.num_experts
    of_mean, mean_of = routing_entropy(layer)
    values = [
        imbalance(load),
        len(dormant_experts(layer)),
        entropy(load).item(),
        1 - layer.kept.sum().item() / max(chosen.sum().item(), 1),
        1 - layer.kept.any(1).double().mean().item(),
        layer.gates.double().sum(1).mean().item(),
        of_mean,
        mean_of,
        layer.logits.max().item(),
    ]
    return dict(zip(KEYS, values, strict=True))


def layer_with(router=None, *, top_k=None, capacity=None, dtype=torch.float32):
    torch.manual_seed(0)
    layer = MoE(D, F, E, top_k, router=router, capacity=capacity)
    return layer.to(dtype).eval()


LAYERS = {
    "top-1": lambda: layer_with(top_k=1),
    "top-2": layer_with,
    "all experts": lambda: layer_with(top_k=E),
    "float64": lambda: layer_with(dtype=torch.float64),
    "bfloat16": lambda: layer_with(dtype=torch.bfloat16),
    "sigmoid": lambda: layer_with(TopKRouter(D, E, 2, score="sigmoid", renormalize=True)),
    "capacity": lambda: layer_with(capacity=Capacity(places=2)),
    "one place": lambda: layer_with(top_k=1, capacity=Capacity(places=1, renormalize=True)),
    "expert choice": lambda: layer_with(ExpertChoiceRouter(D, E, 0.5, multiple_of=1)),
    "ensemble": lambda: layer_with(EnsembleRouter(D, E, 1, ensemble_size=2)),
}


@pytest.mark.parametrize("tokens", [2, 18])
@pytest.mark.parametrize("name", LAYERS)
def test_the_numbers_are_those_of_a_trace(name, tokens):
    layer = LAYERS[name]()
    x = torch.randn(2, tokens, D, dtype=layer.fc1.weight.dtype)
    with RouterHealth(layer) as health, trace_routing(layer) as trace:
        layer(x)
        layer(2 * x[:1])
    assert health.read() == pytest.approx(numbers_of(trace.layers[""]), rel=1e-6, abs=1e-6)


def test_a_layer_that_got_no_token_is_left_out_and_reading_forgets():
    model = nn.ModuleDict({"used": layer_with(), "idle": layer_with()})
    health = RouterHealth(model)
    model["used"](torch.zeros(0, D))
    with pytest.warns(UserWarning, match="has counted no token yet"):
        assert health.read() == {}

    x = torch.randn(7, D)
    model["used"](x)
    first = health.read()
    assert list(first) == [f"used/{key}" for key in KEYS]
    assert all(type(value) is float for value in first.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert health.read() == {}
    model["used"](x)
    assert health.read() == first


def test_one_expert_for_all_and_no_choice_carried_out():
    layer, x = layer_with(), torch.randn(8, D)
    health = RouterHealth(layer)
    with intervene(layer, OneExpert(index=2)):
        layer(x)
    found = health.read()
    assert (found["load_imbalance"], found["dead_experts"]) == (E, E - 1)
    assert (found["load_entropy"], found["unrouted_share"]) == (0, 0)

    with intervene(layer, [OneExpert(index=2), DropRank(1)]):
        layer(x)
    found = health.read()
    assert found["unrouted_share"] == 1 and found["gate_mass"] == 0
    assert found["dead_experts"] == E and found["load_imbalance"] != found["load_imbalance"]


def test_noise_and_gradients_are_what_they_are_without_it():
    layer, x = layer_with().train(), torch.randn(8, D)
    results = []
    for watched in (False, True):
        torch.manual_seed(3)
        health = RouterHealth(layer) if watched else None
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, *(parameter.grad for parameter in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not any(
        value.requires_grad
        for value in vars(health._counts[""]).values()
        if isinstance(value, torch.Tensor)
    )


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


def test_hooks_go_by_closing_by_leaving_the_block_and_with_the_last_reference():
    layer = layer_with(capacity=Capacity(places=2))
    with pytest.raises(RuntimeError, match="stop"), RouterHealth(layer) as health:
        layer(torch.randn(4, D))
        raise RuntimeError("stop")
    assert not hooks_of(layer) and len(health.read()) == len(KEYS)

    first, second = RouterHealth(layer), RouterHealth(layer)
    layer(torch.randn(4, D))
    assert first.read() == second.read()
    first.close()
    first.close()
    layer(torch.randn(4, D))
    assert first.read() == {} and len(second.read()) == len(KEYS)
    del second
    gc.collect()
    assert not hooks_of(layer)


def test_a_watched_model_can_go_and_be_copied_and_saved():
    layer, x = layer_with(), torch.randn(5, D)
    health = RouterHealth(layer)
    copied = copy.deepcopy(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert len(health.read()) == len(KEYS)
        with trace_routing(other) as trace:
            other(x)
        assert len(trace.layers[""].gates) == 5 and health.read() == {}

    gone = weakref.ref(layer)
    del layer, health, trace
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("capacity", [None, Capacity(1.0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_counting_never_reads_a_value(capacity, masked):
    """A fake tensor has no values, so reading one raises."""
    with FakeTensorMode():
        layer = MoE(D, F, E, capacity=capacity).train()
        health = RouterHealth(layer)
        x = torch.randn(2, 8, D, requires_grad=True)
        mask = torch.ones(2, 8, dtype=torch.bool)
        for _ in range(2):
            layer(x, mask if masked else None).sum().backward()
        with pytest.raises(DataDependentOutputException):
            health.read()


def test_reading_copies_to_the_host_once(monkeypatch):
    model = nn.ModuleList(layer_with() for _ in range(3))
    health = RouterHealth(model)
    for layer in model:
        layer(torch.randn(5, D))
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self) or to_host(self))
    assert len(health.read()) == 3 * len(KEYS) and len(copies) == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_counts_in_one_graph(backend, masked):
    torch.compiler.reset()
    layer = layer_with(capacity=Capacity(1.0))
    x = torch.randn(2, 9, D)
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [4]]) if masked else None
    with RouterHealth(layer) as health:
        layer(x, mask)
        right = health.read()
        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        for _ in range(2):
            compiled(x, mask)
            assert health.read() == pytest.approx(right, rel=1e-6)
        with trace_routing(compiled) as trace:
            compiled(x, mask)
        assert health.read() == pytest.approx(numbers_of(trace.layers[""]), rel=1e-6)
    torch.compiler.reset()


def test_a_model_that_was_compiled_before_counts_when_it_is_compiled_again():
    torch.compiler.reset()
    compiled, x = torch.compile(layer_with(), backend="eager"), torch.randn(9, D)
    compiled(x)
    health = RouterHealth(compiled)
    compiled(x)
    with pytest.warns(UserWarning, match=r"call torch\.compiler\.reset\(\)"):
        assert health.read() == {}
    torch.compiler.reset()
    compiled(x)
    assert len(health.read()) == len(KEYS)
    health.close()
    compiled(x)
    assert health.read() == {}
    torch.compiler.reset()


def test_what_inference_mode_counted_training_goes_on_with():
    layer, x = layer_with(), torch.randn(5, D)
    with torch.inference_mode():
        health = RouterHealth(layer)
        layer(x)
    layer(x).sum().backward()
    assert len(health.read()) == len(KEYS)


def test_an_upcycled_model_is_watched():
    torch.manual_seed(0)
    model = upcycle(twins.Encoder(2), E)
    with RouterHealth(model) as health, trace_routing(model) as trace:
        model.train()(torch.randn(2, 9, twins.DIM))
    assert trace.layers and len(health.read()) == len(KEYS) * len(trace.layers)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("patched", [False, True])
def test_hugging_face_models(family, patched):
    transformers = pytest.importorskip("transformers")
    from ironmoe.moe import huggingface

    name = {"mixtral": "Mixtral", "gpt_oss": "GptOss"}[family]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=32,
        head_dim=8,
    )  # fmt: skip
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if patched:
        huggingface.patch(model)
    ids = torch.randint(0, 32, (2, 7))
    with RouterHealth(model) as health, trace_routing(model) as trace:
        model(ids)
    right = {
        f"{layer}/{key}": value
        for layer, seen in trace.layers.items()
        for key, value in numbers_of(seen).items()
    }
    assert len(right) == 2 * len(KEYS)
    assert health.read() == pytest.approx(right, rel=1e-5, abs=1e-6)


def test_a_compiled_hugging_face_model_counts_the_tokens_of_its_attention_mask():
    transformers = pytest.importorskip("transformers")
    from ironmoe.moe import huggingface

    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = huggingface.patch(transformers.MixtralForCausalLM(config).train())
    ids, mask = torch.randint(0, 32, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    torch.compiler.reset()
    with RouterHealth(model) as health:
        model(ids)
        all_tokens = health.read()
        model(ids, attention_mask=mask)
        right = health.read()
        torch.compile(model, backend="aot_eager")(ids, attention_mask=mask).logits.sum().backward()
        assert health.read() == pytest.approx(right, rel=1e-5)
    assert right != all_tokens
    torch.compiler.reset()


def test_a_model_without_routed_layers_is_named():
    with pytest.raises(ValueError, match="model must have MoE layers to watch, got Linear"):
        RouterHealth(nn.Linear(2, 2))


PROGRAM = """
torch.manual_seed(0)
layer, x = MoE(6, 10, 4).eval(), torch.randn(2, 9, 6)
health = RouterHealth(layer)
if rank == 0:
    layer(x)
    alone = health.read()
    layer(x[0])
else:
    layer(x[1])
both = health.read(all_processes=True)
if rank == 0:
    assert both.keys() == alone.keys()
    assert all(abs(both[key] - alone[key]) < 1e-6 for key in alone), (both, alone)
"""


def test_several_processes_read_one_sum(tmp_path):
    imports = "from ironmoe.moe import MoE, RouterHealth"
    run_in_two_processes(PROGRAM, tmp_path, before=imports)
