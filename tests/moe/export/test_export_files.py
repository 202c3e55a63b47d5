"""Whole models in .pt2 files: what comes back gives the same logits and input gradients, and can be
attacked."""

import pytest
import torch
from export_cases import exported, pixels, vmoe
from torch import nn

from ironmoe.attacks import PGD
from ironmoe.moe import upcycle


class Logits(nn.Module):
    """A transformers model with a tensor in and a tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(pixel_values=images).logits


def upcycled_vit():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        num_labels=5,
    )
    model = upcycle(transformers.ViTForImageClassification(config), 4, layers="last 1", noise=0.2)
    nn.init.normal_(model.classifier.weight)
    return Logits(model)


@pytest.fixture(scope="module", params=[vmoe, upcycled_vit], ids=["V-MoE", "upcycled ViT"])
def model_and_file(request, tmp_path_factory):
    model, path = request.param().eval(), tmp_path_factory.mktemp("files") / "model.pt2"
    torch.export.save(exported(model, pixels(3)), path)
    return model, path


def test_a_model_from_a_file_has_the_same_logits_and_input_gradients(model_and_file, rounding):
    model, path = model_and_file
    run = torch.export.load(path).module()
    terms = 3 * 8 * 8 + 2 * (3 * 32 + (32 + 48) + 2 * 32) + 32
    for count in (1, 7):
        images = pixels(count).requires_grad_()
        before, after = model(images), run(images)
        torch.testing.assert_close(after, before, rtol=0, atol=rounding(terms, before))
        ahead = torch.randn_like(before)
        gradients = [torch.autograd.grad(logits, images, ahead)[0] for logits in (before, after)]
        # the way there and back, with products of the numbers of both
        torch.testing.assert_close(*gradients, rtol=0, atol=rounding(4 * terms, gradients[0]))


def test_an_attack_runs_on_a_model_from_a_file(model_and_file):
    model, path = model_and_file
    run = torch.export.load(path).module()
    images = torch.rand(6, 3, 16, 16)
    labels = model(images).argmax(1)
    result = PGD(run, eps=0.2, steps=5, early_stop=False).run(images, labels)
    assert result.success.any()
    fooled = model(result.adversarial).argmax(1) != labels
    assert fooled[result.success].all()
    assert all(p.requires_grad and p.grad is None for p in run.parameters())
