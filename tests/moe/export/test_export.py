"""torch.export: the program of a layer or a model gives the eager values at every size that was
asked for, runs the registered operators, and survives a file."""

import io

import pytest
import torch
from export_cases import ALL, EXAMPLE, SIZES, D, N, exported, moe, quiet, tokens
from torch.export import Dim, export

from ironmoe.moe import Capacity, collect_aux_loss


def operators_of(program):
    """The operators of ironmoe in the graph and in the graphs inside it."""
    nodes = [
        node
        for graph in program.graph_module.modules()
        if isinstance(graph, torch.fx.GraphModule)
        for node in graph.graph.nodes
    ]
    return {str(node.target) for node in nodes if str(node.target).startswith("ironmoe.")}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_an_exported_program_gives_the_eager_values_at_sizes_far_from_its_example(name, training):
    make, inputs = ALL[name]
    model = quiet(make()).train(training)
    program = exported(model, inputs(EXAMPLE))
    run = program.module()
    for count in SIZES:
        x = inputs(count)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert {"ironmoe.grouped_matmul.default", "ironmoe.plan_dispatch.default"} <= operators_of(
        program
    )


@pytest.mark.parametrize("name", ["tokens", "capacity of 4 tokens", "expert choice", "map"])
def test_strict_export_takes_the_same_sizes(name):
    make, inputs = ALL[name]
    model = make().eval()
    run = exported(model, inputs(EXAMPLE), strict=True).module()
    for count in (1, 300):
        x = inputs(count)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_images_and_tokens_of_an_image_may_both_change():
    layer = moe(Capacity(0.7, images_per_group=2)).eval()
    shapes = ({0: Dim("B", min=1, max=64), 1: Dim("N", min=1, max=256)},)
    run = export(layer, (torch.randn(5, N, D),), dynamic_shapes=shapes).module()
    for images, length in ((1, 1), (2, 3), (9, 100)):
        x = torch.randn(images, length, D)
        torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_program_of_another_dtype_survives_a_file(dtype):
    layer = moe(shared_dim=8).eval().to(dtype)
    file = io.BytesIO()
    torch.export.save(exported(layer, tokens(EXAMPLE).to(dtype)), file)
    file.seek(0)
    run = torch.export.load(file).module()
    for count in SIZES:
        x = tokens(count).to(dtype)
        torch.testing.assert_close(run(x), layer(x))


def test_experts_without_a_token_give_nothing():
    layer = moe().eval()
    with torch.no_grad():
        layer.router.weight.zero_()  # ties: all tokens take experts 0 and 1
    run = exported(layer, tokens(EXAMPLE)).module()
    x = tokens(40)
    torch.testing.assert_close(run(x), layer(x))


def test_an_exported_program_has_the_gradients_of_the_layer():
    layer = quiet(moe(shared_dim=8)).train()
    run = exported(layer, tokens(EXAMPLE)).module()
    x = tokens(70)
    of_layer = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    of_run = torch.autograd.grad(run(x).square().sum(), list(run.parameters()))
    for got, want in zip(of_run, of_layer, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class WithLoss(torch.nn.Module):
    """A model that adds up its losses itself."""

    def __init__(self):
        super().__init__()
        self.layer = quiet(moe())

    def forward(self, x):
        return self.layer(x).square().mean() + collect_aux_loss(self)


def test_losses_inside_an_exported_program_are_an_error_in_training_and_0_in_eval():
    model = WithLoss()
    with pytest.raises(
        RuntimeError, match=r"collect_aux_loss must be called outside torch\.export"
    ):
        exported(model.train(), tokens(EXAMPLE))
    run = exported(model.eval(), tokens(EXAMPLE)).module()
    x = tokens(40)
    torch.testing.assert_close(run(x), model(x))


def test_a_layer_that_was_exported_in_training_still_trains():
    layer = moe().train()
    exported(layer, tokens(EXAMPLE))
    layer(tokens(9))
    assert type(layer.aux_loss) is torch.Tensor
