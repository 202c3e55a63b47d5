"""Models and batches for the tests of adversarial training."""

import torch
from torch import nn

from ironmoe.moe import VMoE

EPS = 0.1


def linear(classes=3, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes, dtype=dtype))


def batch(count=6, classes=3, dtype=torch.float64):
    torch.manual_seed(1)
    return 0.3 + 0.4 * torch.rand(count, 1, 4, 4, dtype=dtype), torch.arange(count) % classes


def vmoe(**options):
    torch.manual_seed(0)
    model = VMoE(
        8,
        4,
        16,
        2,
        2,
        32,
        4,
        moe_layers=(0, 1),
        num_experts=4,
        channels=1,
        stem="conv",
        classifier="gap",
        **options,
    )
    nn.init.normal_(model.head.weight)
    return model
