import copy

import hf_families
import pytest
import torch
from pairwise import pairwise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from ironmoe.moe.adapters import huggingface_activation
from ironmoe.moe.adapters.huggingface_activation import decide
from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.huggingface import patch, unpatch

pytest.importorskip("transformers", minversion="5.17")
use_experts_implementation = pytest.importorskip(
    "transformers.integrations.moe"
).use_experts_implementation
assert_as_exact, build, patched, running = (
    hf_families.assert_as_exact,
    hf_families.build,
    hf_families.patched,
    hf_families.running,
)


@pytest.fixture(autouse=True)
def _fresh_warnings():
    huggingface_activation._warn_once.cache_clear()


def experts_of(name, dtype=torch.float32, **options):
    return next(expert_sites(build(name, dtype, **options))).experts


def routed(tokens=33, dtype=torch.float32, gate_dtype=None, dim=32, size=1.0):
    hidden = (size * torch.randn(tokens, dim)).to(dtype)
    index = (
        torch.stack([torch.randperm(hf_families.EXPERTS)[:3] for _ in range(tokens)])
        if tokens
        else torch.zeros(0, 3).long()
    )
    return hidden, index, torch.rand(tokens, 3).to(gate_dtype or dtype)


def module_passes(experts, hidden, index, gates):
    hidden, gates = hidden.detach().requires_grad_(), gates.detach().requires_grad_()
    experts.zero_grad()
    y = experts(hidden, index, gates)
    y.double().square().mean().backward()
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"output": y.detach(), "hidden": hidden.grad, "gates": gates.grad, **grads}


LAYOUTS = [
    "mixtral",
    "gpt_oss",
    "openai_privacy_filter",
    "minimax_m3_vl",
    "deepseek_v4",
    "glm5_next",
    "hy_v4",
    "gemma4",
    "jamba",
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_far_beyond_their_limits(name):
    experts = experts_of(name)
    inputs = routed(size=3.0)
    exact = module_passes(
        copy.deepcopy(experts).double(), inputs[0].double(), inputs[1], inputs[2].double()
    )
    eager, batched = (
        module_passes(running(experts, own), *inputs) for own in ("eager", "batched_mm")
    )
    assert_as_exact(module_passes(patched(experts), *inputs), [eager, batched], exact)


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_bfloat16_with_gates_of_either_dtype(name, gate_dtype):
    experts = experts_of(name, torch.bfloat16)
    inputs = routed(
        dtype=torch.bfloat16,
        gate_dtype=gate_dtype,
        dim=experts.down_proj.shape[2 if experts.is_transposed else 1],
    )
    exact = module_passes(
        copy.deepcopy(experts).double(), inputs[0].double(), inputs[1], inputs[2].double()
    )
    eager, ours = module_passes(experts, *inputs), module_passes(patched(experts), *inputs)
    assert {key: tensor.dtype for key, tensor in ours.items()} == {
        key: tensor.dtype for key, tensor in eager.items()
    }
    assert_as_exact(ours, [eager], exact)


@pytest.mark.parametrize("gate_dtype", [torch.bfloat16, torch.float32])
def test_autocast_computes_in_bfloat16_and_gives_the_dtype_of_eager(gate_dtype):
    experts = experts_of("mixtral")
    inputs = routed(gate_dtype=gate_dtype)
    exact = module_passes(
        copy.deepcopy(experts).double(), inputs[0].double(), inputs[1], inputs[2].double()
    )
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = module_passes(experts, *inputs), module_passes(patched(experts), *inputs)
    for key, tensor in ours.items():
        assert tensor.dtype == eager[key].dtype == (gate_dtype if key == "gates" else torch.float32)
        error, own = ((result[key].double() - exact[key]).abs().max() for result in (ours, eager))
        assert (
            1e-6 * exact[key].abs().max()
            < error
            <= 2 * own + torch.finfo(torch.bfloat16).eps * exact[key].abs().max()
        )


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_no_tokens(name):
    ours = module_passes(patched(experts_of(name)), *routed(tokens=0))
    assert ours["output"].shape == ours["hidden"].shape == (0, 32)
    assert all(tensor.nan_to_num(1).count_nonzero() == 0 for tensor in ours.values())


@pytest.mark.parametrize(
    ("name", "garbage", "compiled"),
    pairwise(["mixtral", "gpt_oss"], [0.0, torch.nan], [False, True]),
)
def test_choices_of_other_processes_are_dropped(name, garbage, compiled):
    ours = patched(experts_of(name, torch.float64))
    hidden, index, gates = routed(tokens=9, dtype=torch.float64)
    elsewhere = torch.zeros_like(index, dtype=torch.bool)
    elsewhere[:, 1] = elsewhere[4] = True
    expected = module_passes(ours, hidden, index, gates.masked_fill(elsewhere, 0))
    expected["gates"] = expected["gates"].masked_fill(elsewhere, 0)
    index = index.masked_fill(elsewhere, hf_families.EXPERTS)
    index[4, 2] += 5
    if compiled:
        ours.compile(backend="aot_eager", fullgraph=True)
    actual = module_passes(ours, hidden, index, gates.masked_fill(elsewhere, garbage))
    for key, tensor in expected.items():
        torch.testing.assert_close(actual[key], tensor)


class LowRank(nn.Module):
    """What PEFT puts on a weight of experts; counts how often it is asked."""

    def __init__(self, weight):
        super().__init__()
        num_experts, rows, columns = weight.shape
        self.down, self.up = (
            nn.Parameter(torch.randn(num_experts, 2, columns)),
            nn.Parameter(torch.randn(num_experts, rows, 2)),
        )
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight + self.up @ self.down


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized_weights_are_read_once_and_get_gradients(when):
    experts = experts_of("mixtral")
    ours = patched(experts) if when == "before" else copy.deepcopy(experts)
    for module in (experts, ours):
        torch.manual_seed(1)
        parametrize.register_parametrization(module, "gate_up_proj", LowRank(module.gate_up_proj))
        module.parametrizations.gate_up_proj.original.requires_grad_(False)
    inputs = routed()
    if when == "after":
        patch(ours)
    ours.parametrizations.gate_up_proj[0].calls = 0
    results, expected = module_passes(ours, *inputs), module_passes(experts, *inputs)
    assert ours.parametrizations.gate_up_proj[0].calls == 1 and ours._ironmoe.activation == "swiglu"
    frozen = "parametrizations.gate_up_proj.original"
    assert results.pop(frozen) is None is expected.pop(frozen)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-4)


def test_frozen_weights_get_no_gradient_and_the_input_the_same():
    experts = patched(experts_of("gpt_oss"))
    inputs = routed()
    trained = module_passes(experts, *inputs)
    frozen = module_passes(experts.requires_grad_(False), *inputs)
    for key, tensor in frozen.items():
        assert (
            torch.equal(tensor, trained[key])
            if key in ("output", "hidden", "gates")
            else tensor is None
        )


# Which activation.


GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_python": "geglu",
    "gelu_new": "geglu_tanh", "gelu_fast": "geglu_tanh",
    "gelu_pytorch_tanh": "geglu_tanh", "quick_gelu": None, "relu": None, "relu2": None,
    "mish": None, "tanh": None,
}  # fmt: skip
PLAIN = {
    "relu2": "relu2",
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "mish": None,
    "quick_gelu": "quick_gelu",
}


@pytest.mark.parametrize(
    ("name", "option", "function", "expected"),
    [("mixtral", "hidden_act", *pair) for pair in GATED.items()]
    + [("nemotron_h", "mlp_hidden_act", *pair) for pair in PLAIN.items()],
)
def test_activation_is_told_by_what_it_computes(name, option, function, expected):
    experts = experts_of(name, **{option: function})
    inputs = routed(dim=experts.down_proj.shape[1])
    eager = module_passes(experts, *inputs)
    if expected:
        ours = patched(experts)
    else:
        with pytest.warns(
            UserWarning, match=rf"{type(experts).__name__} keeps .* no activation like"
        ):
            ours = patch(copy.deepcopy(experts))
    assert ours._ironmoe.activation == expected
    torch.testing.assert_close(module_passes(ours, *inputs), eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [("gpt_oss", "limit", 5.0), ("gpt_oss", "alpha", 1.0), ("deepseek_v4", "limit", 7.0)],
)
def test_other_constants_are_another_activation(name, constant, value):
    experts = experts_of(name)
    assert getattr(experts, constant) != value
    setattr(experts, constant, value)
    inputs = routed(size=3.0)
    with pytest.warns(UserWarning, match="keeps the eager experts"):
        ours = patch(copy.deepcopy(experts))
    for key, tensor in module_passes(experts, *inputs).items():
        assert torch.equal(module_passes(ours, *inputs)[key], tensor)


def straight_through(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate).detach() * up


@pytest.mark.parametrize(
    ("apply_gate", "reason"),
    [
        (
            lambda gate_up: gate_up.chunk(2, dim=-1)[0].tanh() * gate_up.chunk(2, dim=-1)[1],
            "no activation like its _apply_gate",
        ),
        (straight_through, "no activation like its _apply_gate"),
        (lambda gate_up: 1 / 0, "could not be tried"),
    ],
)
def test_unknown_gate_falls_back_with_one_warning_for_all_layers(apply_gate, reason):
    model = build("minimax_m3_vl")
    for site in expert_sites(model):
        site.experts._apply_gate = apply_gate
    with pytest.warns(UserWarning, match=reason) as caught:
        patch(model)
    assert len(caught) == 1 and "MiniMaxM3VLExperts" in str(caught[0].message)
    if "tried" not in reason:
        ids = torch.randint(3, hf_families.VOCAB, (2, 7))
        assert torch.equal(model(input_ids=ids).logits, unpatch(model)(input_ids=ids).logits)


def test_decorated_subclass_falls_back_to_the_forward_it_inherits():
    experts = experts_of("mixtral")
    inputs = routed()
    eager = experts(*inputs)
    subclass = type("Sub", (type(experts),), {})
    experts.__class__ = use_experts_implementation(subclass)
    # eager Mixtral does not ask for it
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0].tanh()
    with pytest.warns(UserWarning, match="Sub keeps the eager experts"):
        assert torch.equal(patch(experts)(*inputs), eager)


def test_state_ironmoe_does_not_know_falls_back():
    experts = experts_of("mixtral")
    experts.act_fn = nn.PReLU(init=0.5)
    with pytest.warns(UserWarning, match=r"it holds act_fn\.weight"):
        assert patch(experts)._ironmoe.activation is None


def test_activation_is_told_inside_any_context():
    experts = experts_of("mixtral")
    for context in (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FakeTensorMode(),
    ):
        with context:
            assert decide(experts) == "swiglu"
    told = []
    torch.func.grad(lambda x: told.append(decide(experts)) or x.sum())(torch.randn(3))
    assert told == ["swiglu"]
