"""Weights that the kernels cannot read: the model's own experts run, or an error says so."""

import copy
import warnings

import hf_families
import pytest
import torch
import twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ironmoe.kernels import Routing, expert_mlp, grouped_matmul
from ironmoe.kernels.route import holds_its_numbers
from ironmoe.moe import MoE, upcycle
from ironmoe.moe.adapters import huggingface, huggingface_activation
from ironmoe.moe.adapters.huggingface_routing import expert_sites
from ironmoe.moe.huggingface import patch, register

build, running = hf_families.build, hf_families.running
IDS = torch.randint(3, hf_families.VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_warnings():
    huggingface_activation._warn_once.cache_clear()


class Int8(torch.Tensor):
    """Says float32 and holds int8, as the tensors of quantisation libraries do: each operation runs
    on the numbers that it stands for."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def numbers(self):
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].codes, args[0].scale)
        args = torch.utils._pytree.tree_map_only(cls, cls.numbers, args)
        return function(*args, **(kwargs or {}))


def quantise(module, names=("gate_up_proj", "down_proj")):
    """In place."""
    for name in names:
        weight = Int8.of(module.get_parameter(name).detach())
        setattr(module, name, nn.Parameter(weight, requires_grad=False))


def first_experts(model):
    return next(expert_sites(model)).experts


def calls_of_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(
        huggingface,
        "expert_mlp",
        lambda *args, **more: calls.append(1) or expert_mlp(*args, **more),
    )
    return calls


@pytest.mark.parametrize("when", ["before patch", "after patch", "after a forward"])
@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj",)])
@torch.no_grad()
def test_a_quantised_layer_runs_its_own_experts_and_the_others_stay_fused(when, names, monkeypatch):
    model = build("mixtral")
    quantise(first_experts(model), names)
    expected = model(IDS).logits

    ours = build("mixtral")
    if when == "before patch":
        quantise(first_experts(ours), names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch(ours)
        if when == "after a forward":
            ours(IDS)
        if when != "before patch":
            assert not caught
            quantise(first_experts(ours), names)
        calls = calls_of_kernels(monkeypatch)
        for _ in range(2):
            actual = ours(IDS).logits
    assert len(calls) == 2  # the second layer, twice
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    (warning,) = [str(w.message) for w in caught if "keeps the eager" in str(w.message)]
    assert "MixtralExperts" in warning and "a weight is a Int8" in warning


def test_weights_of_another_dtype_after_patch_run_the_models_own_experts(monkeypatch):
    model = patch(build("mixtral"))
    calls = calls_of_kernels(monkeypatch)
    experts = first_experts(model)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.warns(UserWarning, match="keeps the eager"), pytest.raises(RuntimeError):
        model(IDS)  # these numbers are no weights for torch either
    assert not calls


@torch.no_grad()
def test_a_quantised_model_compiles_around_its_experts():
    model = build("mixtral")
    quantise(first_experts(model))
    expected = model(IDS, use_cache=False).logits
    with pytest.warns(UserWarning, match="keeps the eager"):
        compiled = torch.compile(patch(model), backend="eager")
        actual = compiled(IDS, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_quantised_by_torchao(kind, when):
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.FqnToConfig(
        {r"re:.*layers\.0\.mlp\.experts\.(gate_up_proj|down_proj)": getattr(quantization, kind)()}
    )

    def quantised(model):
        quantization.quantize_(model, config, filter_fn=None)
        return model

    model = build("mixtral", torch.bfloat16, hidden_size=64, intermediate_size=64)
    expected = quantised(copy.deepcopy(model))(IDS).logits
    with pytest.warns(UserWarning, match=r"MixtralExperts keeps .*a weight is a (Int8|Float8)Ten"):
        ours = quantised(patch(model)) if when == "after" else patch(quantised(model))
        assert first_experts(ours).down_proj.dtype == torch.bfloat16
        actual = ours(IDS).logits
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * scale


# ironmoe's own layers.


def test_a_layer_with_such_weights_names_the_argument():
    x = torch.randn(5, 8)
    moe = MoE(8, 16, 4)
    quantise(moe.fc1, ("weight",))
    with pytest.raises(ValueError, match=r"w_in must .* got a Int8"):
        moe(x)
    moe = MoE(8, 16, 4)
    quantise(moe.fc2, ("weight",))
    with pytest.raises(ValueError, match=r"w_out must .* got a Int8"):
        moe(x)
    routing = Routing(torch.ones(5, 1), torch.zeros(5, 1, dtype=torch.int32))
    w_in, w_out, bias = torch.randn(4, 16, 8), torch.randn(4, 8, 16), torch.randn(4, 16)
    with pytest.raises(ValueError, match=r"b_in must .* got a Int8"):
        expert_mlp(x, w_in, w_out, routing, b_in=Int8.of(bias))
    with pytest.raises(ValueError, match=r"b_out must .* got a Int8"):
        expert_mlp(x, w_in, w_out, routing, b_out=Int8.of(bias[:, :8]))
    with pytest.raises(ValueError, match=r"weight must .* got a Int8"):
        grouped_matmul(x, Int8.of(w_in), torch.tensor([0, 5, 5, 5, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"w_in must .*sparse"):
        expert_mlp(x, w_in.to_sparse(), w_out, routing)


def test_an_mlp_with_such_weights_is_not_upcycled():
    mlp = twins.TimmMlp()
    quantise(mlp.fc1, ("weight",))
    with pytest.raises(ValueError, match=r"must have weights that are plain tensors, got .*Int8"):
        upcycle(mlp, 2)


class Tagged(torch.Tensor):
    """A subclass that changes nothing."""


def test_what_holds_its_numbers():
    weight = torch.randn(4, 3, 2)
    parameter = nn.Parameter(weight)
    for readable in (weight, parameter, parameter * 2, weight.as_subclass(Tagged), weight.mT):
        assert holds_its_numbers(readable)
    with FakeTensorMode() as mode:
        assert holds_its_numbers(mode.from_tensor(weight))
    seen = []
    torch.func.vmap(lambda w: seen.append(holds_its_numbers(w)) or w)(weight)
    assert seen == [True]
    for other in (Int8.of(weight), nn.Parameter(Int8.of(weight)), weight.to_sparse()):
        assert not holds_its_numbers(other)


def test_a_part_of_a_weight_is_not_taken_for_the_whole():
    """DTensor: two processes, of which one is here."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        moe = MoE(8, 16, 4)
        part = distribute_tensor(moe.fc1.weight.detach(), mesh, [Shard(0)])
        assert part.shape == moe.fc1.weight.shape and not holds_its_numbers(part)
        moe.fc1.weight = nn.Parameter(part)
        with pytest.raises(ValueError, match=r"w_in must .* got a DTensor.* the local part"):
            moe(torch.randn(5, 8))
        assert holds_its_numbers(part.to_local())
    finally:
        torch.distributed.destroy_process_group()


def test_experts_that_fsdp_has_sharded_are_patched_without_a_word():
    """They are whole in each forward."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = build("mixtral")
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*keeps the eager experts")
            patch(model)(IDS)
    finally:
        torch.distributed.destroy_process_group()


def test_registered_experts_are_asked_too():
    register()
    model = running(build("mixtral"), "ironmoe")
    quantise(first_experts(model))
    with torch.no_grad(), pytest.warns(UserWarning, match="keeps the eager"):
        actual = model(IDS).logits
        expected = running(model, "eager")(IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
