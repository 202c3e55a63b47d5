"""Blocks that share their MLP share its experts; other ties are named."""

import copy
import pickle

import pytest
import torch
import twins
from torch import nn

from ironmoe.moe import MoE
from ironmoe.moe.adapters.upcycle import upcycle

DIM = twins.DIM


def sharing(depth=4, every=1):
    """Every ``every``-th block of an encoder has the MLP of the first."""
    model = twins.Encoder(depth).double()
    for block in model.blocks[::every]:
        block.mlp = model.blocks[0].mlp
    return model


def moes(model):
    return [block.mlp for block in model.blocks]


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_that_share_an_mlp_share_a_layer_of_experts(every):
    model = sharing(every=every)
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    expected = model(x)
    upcycle(model, 3, 2)
    torch.testing.assert_close(model(x), expected)
    assert all(isinstance(moe, MoE) for moe in moes(model))
    assert len(set(moes(model)[::every])) == 1
    assert len(set(moes(model))) == (1 if every == 1 else 3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(set(moes(twin)[::every])) == 1


def test_parameters_are_those_of_the_layers_that_are_not_shared():
    one = upcycle(sharing(1), 3, 2)
    four = upcycle(sharing(4), 3, 2)
    blocks = sum(p.numel() for p in four.parameters()) - sum(p.numel() for p in one.parameters())
    attention_and_norms = sum(
        p.numel() for name, p in one.blocks.named_parameters() if ".mlp." not in name
    )
    assert blocks == 3 * attention_and_norms


def test_the_gradient_of_a_shared_layer_is_the_sum_over_its_blocks():
    model = upcycle(sharing(2), 2, 2)
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    apart = copy.deepcopy(model)
    apart.blocks[1].mlp = copy.deepcopy(apart.blocks[0].mlp)
    for twin in (model, apart):
        twin.eval()(x).square().sum().backward()
    total = sum(block.mlp.fc1.weight.grad for block in apart.blocks)
    torch.testing.assert_close(model.blocks[0].mlp.fc1.weight.grad, total)


def test_one_block_many_times_is_one_layer():
    block = twins.Block(twins.TimmMlp())
    model = upcycle(nn.Sequential(block, block, block), 3, 2)
    assert isinstance(block.mlp, MoE) and model[0] is model[1] is model[2] is block


def test_a_shared_block_inside_two_modules_is_replaced_once():
    block = twins.Block(twins.TimmMlp())
    model = upcycle(nn.Sequential(nn.Sequential(block), nn.Sequential(block)), 3, 2)
    assert isinstance(block.mlp, MoE) and model[0][0] is model[1][0] is block


def assert_refused(model, message, **options):
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        upcycle(model, 3, 2, **options)
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))


def test_a_choice_that_parts_blocks_with_one_mlp_is_refused():
    message = (
        r"layers must name all blocks that share one MLP or none of them, got blocks\.{} without "
        r"blocks\.{}, which is the same module"
    )
    assert_refused(sharing(), message.format(r"1\.mlp", r"0\.mlp"), layers=[1, 3])
    upcycle(sharing(every=2), 3, 2, layers=[1, 3])
    upcycle(sharing(every=2), 3, 2, layers=[0, 2])
    model = twins.Encoder(2)
    model.again = model.blocks[1].mlp
    assert_refused(model, r"got blocks\.1\.mlp without again, which is the same")


@pytest.mark.parametrize("part", ["fc1.weight", "fc1", "fc2.bias", "fc2"])
def test_mlps_that_share_a_part_are_refused(part):
    model = twins.Encoder(3)
    parent, _, name = part.rpartition(".")
    owner, other = (model.blocks[i].mlp.get_submodule(parent) for i in (0, 2))
    setattr(other, name, getattr(owner, name))
    assert_refused(model, rf"got blocks\.0\.mlp\.{part} and blocks\.2\.mlp\.{part}, which are the")
    assert_refused(model, r"blocks\.2\.mlp", layers=[2])
    upcycle(model, 3, 2, layers=[1])


def test_a_tie_inside_an_mlp_and_to_the_rest_of_the_model_is_refused():
    model = twins.Encoder(2, mlp=lambda: twins.TimmMlp(hidden=DIM))
    model.blocks[1].mlp.fc2.weight = model.blocks[1].mlp.fc1.weight
    assert_refused(model, r"blocks\.1\.mlp\.fc1\.weight and blocks\.1\.mlp\.fc2\.weight")
    model = twins.Encoder(2)
    model.head.fc1.weight = model.blocks[0].mlp.fc1.weight
    assert_refused(model, r"blocks\.0\.mlp\.fc1\.weight and head\.fc1\.weight")


def test_other_ties_of_a_model_do_not_matter():
    model = twins.Encoder(2)
    model.blocks[1].attn = model.blocks[0].attn
    model.blocks[1].norm1.weight = model.blocks[0].norm1.weight
    assert sum(isinstance(m, MoE) for m in upcycle(model, 3, 2).modules()) == 2
