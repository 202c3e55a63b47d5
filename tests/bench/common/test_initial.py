"""Models of one seed begin alike wherever they have the same modules, and see the same batches."""

import pytest
import torch

from ironmoe.bench.common import train as training
from ironmoe.bench.common.checkpoints import ARCHITECTURES, MOE_LAYERS, architecture
from ironmoe.bench.common.loop.initial import paired_model
from ironmoe.bench.common.train import Recipe, train

SHAPE = (1, 8, 8)


def models(seed=0, **options):
    return {
        name: paired_model(
            architecture(name, SHAPE, 3) | (options if name == "V-MoE" else {}), seed
        )
        for name in ARCHITECTURES
    }


def common(moe, dense):
    """The names of all weights of the modules that both models have."""
    of_moe, of_dense = moe.state_dict(), dense.state_dict()
    replaced = tuple(f"blocks.{layer}.mlp." for layer in MOE_LAYERS)
    names = [name for name in of_dense if not name.startswith(replaced)]
    assert all(of_moe[name].shape == of_dense[name].shape for name in names)
    return names


@pytest.mark.parametrize("experts", [{}, {"num_experts": 3, "expert_dim": 20}])
def test_the_two_models_of_the_demo_differ_in_experts_and_routers_alone(experts):
    pair = models(num_experts=8) if not experts else models(**experts)
    moe, dense = pair["V-MoE"].state_dict(), pair["ViT"].state_dict()
    names = common(pair["V-MoE"], pair["ViT"])
    assert len(names) > 30
    assert all(torch.equal(moe[name], dense[name]) for name in names)
    only_here = {name.split(".mlp.")[0] for name in moe.keys() - set(names)}
    assert only_here == {f"blocks.{layer}" for layer in MOE_LAYERS}


def test_another_seed_gives_other_weights():
    first, second = models(0)["ViT"].state_dict(), models(1)["ViT"].state_dict()
    drawn = [name for name, weight in first.items() if weight.unique().numel() > 1]
    assert len(drawn) > 15
    assert not any(torch.equal(first[name], second[name]) for name in drawn)


def test_drawing_weights_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    models()
    assert torch.equal(torch.get_rng_state(), before)


def test_both_models_see_the_same_batches_in_the_same_order(monkeypatch):
    """Router noise, which one of them draws between the batches, changes none."""
    images, labels = torch.rand(30, *SHAPE), torch.arange(30) % 3
    seen = {name: [] for name in ARCHITECTURES}
    step = training._step

    for name, model in models().items():

        def noted(model, optimizer, batch, targets, *rest, name=name):
            seen[name].append((batch.clone(), targets.clone()))
            return step(model, optimizer, batch, targets, *rest)

        monkeypatch.setattr(training, "_step", noted)
        train(model, images, labels, Recipe(epochs=2, batch_size=8), seed=5)

    of_moe, of_dense = (seen[name] for name in ARCHITECTURES)
    assert len(of_moe) == len(of_dense) == 8
    for (batch, targets), (other, others) in zip(of_moe, of_dense, strict=True):
        assert torch.equal(batch, other) and torch.equal(targets, others)
    assert not torch.equal(of_moe[0][0], of_moe[4][0])  # the epochs differ
