"""Models and batches for the tests of adversarial training."""

import torch
from torch import nn

from ironmoe.moe import MoE, VMoE

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


class Rows(nn.Module):
    """Images (B, 1, 4, 4), whose 4 rows are tokens, through two MoE layers to logits (B, 3). Tokens
    differ, and an attack moves their routing. ``padding`` of the tokens are masked."""

    def __init__(self, num_experts=4, top_k=None, padding=0, make_moe=None, **options):
        super().__init__()
        make_moe = make_moe or (lambda: MoE(6, 10, num_experts, top_k, **options))
        self.embed = nn.Linear(4, 6, bias=False)
        self.moes = nn.ModuleList([make_moe(), make_moe()])
        self.head = nn.Linear(6, 3)
        self.padding = padding

    def forward(self, images):
        x = 8 * self.embed(images[:, 0] - 0.5)
        mask = None
        if self.padding:
            mask = (torch.arange(4) < 4 - self.padding).expand(len(x), 4)
        for moe in self.moes:
            x = x + 3 * (moe(x) if mask is None else moe(x, mask))
        return self.head(x.mean(1))


def rows(**options):
    torch.manual_seed(0)
    return Rows(**options).double()


def digits(trained, others):
    """So many of scikit-learn's 1797 digits (N, 1, 8, 8), with labels, to train on, and so many
    others."""
    from sklearn.datasets import load_digits  # what other tests of training do without

    loaded = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    images = torch.tensor(loaded.images / 16, dtype=torch.float32)[order, None]
    labels = torch.tensor(loaded.target)[order]
    both = slice(trained), slice(trained, trained + others)
    return [(images[rows], labels[rows]) for rows in both]
