"""Statistics of models in every wrapping; ``tests/moe/test_golden.py`` holds them against the
official numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ironmoe.attacks import attack_statistics
from ironmoe.moe import MoE, VMoE


class Wrapped(nn.Module):
    """A model inside another one, which may return an object with the logits and take images of
    another range."""

    def __init__(self, body, answer=lambda logits: logits, shift=0.0):
        super().__init__()
        self.body, self.answer, self.shift = body, answer, shift

    def forward(self, x):
        return self.answer(self.body(x + self.shift))


class Twice(nn.Module):
    """One layer that runs two times."""

    def __init__(self):
        super().__init__()
        self.moe = MoE(6, 8, 4, 1)

    def forward(self, x):
        return self.moe(self.moe(x)).mean(1)


def vmoe(**options):
    torch.manual_seed(0)
    model = VMoE(
        6,
        3,
        12,
        2,
        2,
        16,
        3,
        moe_layers=(0, 1),
        channels=1,
        classifier="gap",
        num_experts=6,
        **options,
    ).double()
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def batch():
    """Images, changed images, labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 1, 6, 6, dtype=torch.float64, generator=generator)
    changed = (
        images + 0.3 * torch.randn(images.shape, dtype=torch.float64, generator=generator)
    ).clamp(0, 1)
    return images, changed, torch.arange(8) % 3


@pytest.mark.parametrize(
    "model",
    [vmoe(ensemble_size=2), Wrapped(vmoe(ensemble_size=2)), vmoe()],
    ids=["ensemble", "wrapped", "one"],
)
def test_padding_does_not_count_in_any_model(batch, model):
    images, changed, labels = batch
    valid = torch.arange(8) < 5
    padded = attack_statistics(model, images, changed, labels, valid=valid)
    alone = attack_statistics(model, *(part[:5] for part in batch))
    assert max(alone.routing_change().values()) > 0
    for reading, layers in alone.overlap.items():
        for name, (total, count) in layers.items():
            assert padded.overlap[reading][name] == (pytest.approx(total), count)
    assert (padded.images, padded.changed, padded.correct) == (5, alone.changed, alone.correct)


def test_padding_does_not_count_in_a_layer_that_runs_twice():
    torch.manual_seed(0)
    model, images, labels = Twice(), torch.randn(4, 3, 6), torch.zeros(4, dtype=torch.int64)
    changed = torch.cat([images[:1], -images[1:]])
    found = attack_statistics(model, images, changed, labels, valid=labels == torch.arange(4))
    assert found.overlap["realised"]["moe"] == (6.0, 6)
    assert attack_statistics(model, images, changed, labels).overlap["realised"]["moe"][0] < 18


def test_models_are_called_as_attacks_call_them(batch):
    images, changed, labels = batch
    plain = attack_statistics(vmoe(), images, changed, labels)
    for model, options in (
        (Wrapped(vmoe(), lambda logits: SimpleNamespace(logits=logits)), {}),
        (Wrapped(vmoe(), lambda logits: (None, logits)), {"logits_fn": lambda output: output[1]}),
        (Wrapped(vmoe(), shift=0.25), {"normalize": ([0.25], [1.0])}),
    ):
        found = attack_statistics(model, images, changed, labels, **options)
        assert (found.changed, found.correct) == (plain.changed, plain.correct)
        assert found.loss == pytest.approx(plain.loss)
        assert list(found.routing_change().values()) == pytest.approx(
            list(plain.routing_change().values())
        )
    with pytest.raises(TypeError, match=r"or logits_fn take it out of the output, got tuple"):
        attack_statistics(Wrapped(vmoe(), lambda logits: (None, logits)), images, changed, labels)
