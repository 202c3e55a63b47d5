"""Small models in float64, and images for them, that the tests of smoothness share."""

import torch
from torch import nn

from ironmoe.moe import MoE, TopKRouter, VMoE


def images_of(count, size=6, seed=0):
    """(B, 1, size, size) float64 in [0.1, 0.9], all different from each other."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand(count, 1, size, size, generator=generator, dtype=torch.float64)


def vmoe(seed=0, **options):
    """A V-MoE with two MoE layers, 4 tokens and 3 classes, whose head is not 0, whose tokens differ
    and whose routers are easily moved."""
    torch.manual_seed(seed)
    arguments = {
        "moe_layers": (0, 1),
        "num_experts": 4,
        "top_k": 2,
        "channels": 1,
        "classifier": "gap",
    } | options
    model = VMoE(6, 3, 12, 2, 2, 16, 3, **arguments)
    nn.init.normal_(model.head.weight)
    with torch.no_grad():
        model.stem.weight.mul_(4)
        for block in model.blocks:
            if hasattr(block.mlp, "router"):
                block.mlp.router.weight.mul_(3)
    return model.double().eval()


def dense(seed=0):
    """The same without experts."""
    return vmoe(seed, moe_layers=())


class LinearlyRouted(nn.Module):
    """Images (B, d) → N tokens, each a linear function of the image; one MoE layer; a linear head
    on the mean token. Router logits are linear in the image, so first order is exact for them."""

    def __init__(self, pixels=5, tokens=3, experts=4, top_k=2, classes=3, seed=0, **router):
        super().__init__()
        torch.manual_seed(seed)
        self.tokens = tokens
        self.stem = nn.Linear(pixels, tokens * 6)
        self.moe = MoE(
            6, 8, experts, top_k, activation="gelu", router=TopKRouter(6, experts, top_k, **router)
        )
        self.head = nn.Linear(6, classes)
        self.double().eval()

    def forward(self, x):
        tokens = self.stem(x.flatten(1)).unflatten(1, (self.tokens, 6))
        return self.head((tokens + self.moe(tokens)).mean(1))
