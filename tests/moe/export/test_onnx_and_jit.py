"""ONNX, TorchScript, and the tools that count operations through its tracer."""

import pytest
import torch
from export_cases import ALL, EXAMPLE, D, E, F, moe, pixels, tokens, vmoe
from torch import nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from ironmoe.kernels import grouped_matmul
from ironmoe.kernels.onnx_graph import count_below, grouped_rows, stable_sort
from ironmoe.moe import Capacity, MoE, SoftMoE


def much_at_once():
    """An ensemble whose experts take groups of images by priority, and a head that attends.

    An export takes 5 to 15 s, so what goes together is exported together.
    """
    capacity = Capacity(0.7, priority=True, images_per_group=2)
    return vmoe(ensemble_size=2, capacity=capacity, classifier="map")


ONNX = {name: ALL[name] for name in ("tokens", "expert choice", "SoftMoE")}
ONNX |= {"much at once": (much_at_once, pixels)}


def products(layer, x):
    """Multiply-adds of the products that run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ONNX)
def test_an_onnx_model_gives_the_values_of_the_layer_at_any_size(name):
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    make, inputs = ONNX[name]
    model = make().eval()
    shapes = ({0: Dim("T", min=1, max=4096)},)
    program = torch.onnx.export(
        model, (inputs(EXAMPLE),), dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    for count in (1, 2, 33, 300):
        x = inputs(count)
        torch.testing.assert_close(program(x)[0], model(x), rtol=1e-4, atol=1e-4)


def test_what_an_onnx_graph_is_made_of_computes_the_same(monkeypatch):
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)  # expert 1 has no row, two are dropped
    x, weight, bias = torch.randn(10, D), torch.randn(3, F, D), torch.randn(3, F)
    torch.testing.assert_close(
        grouped_rows(x, weight, bias, offsets), grouped_matmul(x, weight, offsets, bias=bias)
    )

    values = torch.tensor([[3, 1, 3, 0, 1], [2, 2, 2, 2, 2]])
    ascending, _ = stable_sort(values, 1)
    by_search = count_below(ascending, torch.arange(5))
    monkeypatch.setattr("ironmoe.kernels.onnx_graph.onnx_exporting", lambda: True)
    assert torch.equal(count_below(ascending, torch.arange(5)), by_search)


def traced(layer):
    return torch.jit.trace(layer, tokens(EXAMPLE))


def traced_as_a_function(layer):
    return torch.jit.trace(lambda x: layer(x), tokens(EXAMPLE))


@pytest.mark.parametrize("trace", [traced, traced_as_a_function])
def test_torch_jit_trace_says_what_to_use(trace):
    with pytest.raises(RuntimeError, match=r"use torch\.export\.export\(model, args\)"):
        trace(moe().eval().requires_grad_(False))


@pytest.mark.parametrize("model", [moe(), SoftMoE(D, F, E), vmoe(), nn.Sequential(moe())])
def test_torch_jit_script_says_what_to_use(model):
    with pytest.raises(RuntimeError, match=r"use torch\.export\.export\(model, args\)"):
        torch.jit.script(model)


def test_the_old_exporter_to_onnx_says_what_to_use(tmp_path):
    with pytest.raises(RuntimeError, match="dynamo=True"):
        torch.onnx.export(moe().eval(), (tokens(5),), tmp_path / "moe.onnx", dynamo=False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("sizes", [(16, 24, 50), (256, 512, 2000)])
def test_the_tracer_that_fvcore_uses_sees_the_products_of_k_experts(trains, sizes):
    """Every product of an expert is a node that a tool knows, on the rows that ran."""
    dim, hidden, count = sizes
    layer = MoE(dim, hidden, 8, 2).eval().requires_grad_(trains)
    x = torch.randn(count, dim)
    graph, _ = torch.jit._get_trace_graph(layer, (x,))
    experts = [node for node in graph.nodes() if node.kind() == "aten::addmm"]
    rows = sum(node.output().type().sizes()[0] for node in experts)
    assert rows == 2 * 2 * count  # two layers, K = 2
    assert not any(node.kind() == "prim::PythonOp" for node in graph.nodes())


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fvcore_counts_the_products_of_k_experts_a_token(trains, dtype):
    fvcore = pytest.importorskip("fvcore.nn")
    layer = MoE(256, 512, 8, 2).eval().requires_grad_(trains).to(dtype)
    counted = fvcore.FlopCountAnalysis(layer, torch.randn(2000, 256, dtype=dtype)).by_operator()
    assert counted["linear"] == 2000 * 256 * 8
    assert counted["addmm"] == 2 * 2000 * 2 * 256 * 512
    # with gradients the sum over choices is a product, too
    assert counted.total() - counted["linear"] - counted["addmm"] in (0, 2000 * 2 * 256)


def test_fvcore_and_torch_agree():
    fvcore = pytest.importorskip("fvcore.nn")
    layer = MoE(D, F, 8, 2).eval().requires_grad_(False)
    x = tokens(50)
    assert fvcore.FlopCountAnalysis(layer, x).total() == products(layer, x)


def test_torchinfo_counts_every_expert_for_every_token():
    """docs/adapters.md says so: it multiplies the parameters of a layer by its tokens."""
    torchinfo = pytest.importorskip("torchinfo")
    layer = MoE(D, F, 8, 2).eval()
    summary = torchinfo.summary(layer, input_data=tokens(50), verbose=0)
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert summary.total_params == parameters
    assert summary.total_mult_adds == 50 * parameters
