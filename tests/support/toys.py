"""Small models and data that the tests of attacks share.

A model is fitted once in a process: later calls with equal data and options get a copy of it, so
that no test depends on what another one did to its model.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn

from ironmoe.moe import VMoE


def blobs(count=120, classes=4, size=12, noise=0.1, seed=0):
    """Images (N, 1, size, size) near one prototype a class, labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.rand(classes, 1, size, size, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(count) % classes
    images = (
        0.5
        + 0.35 * (prototypes[labels] - 0.5)
        + noise * torch.randn(count, 1, size, size, generator=generator)
    )
    return images.clamp(0, 1), labels


def fit(model, images, labels, steps=60, rate=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def _fitted_once(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``make``, asked once for each content of its images and labels and each set of options."""
    fitted: dict[object, tuple[nn.Module, torch.Tensor]] = {}

    @functools.wraps(make)
    def copied(images, labels, seed=0, **options):
        arrays = tuple((t.shape, t.dtype, t.numpy().tobytes()) for t in (images, labels))
        key = (arrays, seed, repr(sorted(options.items())))
        if key not in fitted:
            fitted[key] = make(images, labels, seed, **options), torch.get_rng_state()
        model, random_state = fitted[key]
        torch.set_rng_state(random_state)  # as if it had been fitted just now
        return copy.deepcopy(model)

    return copied


@_fitted_once
def vmoe(images, labels, seed=0, **options):
    """A V-MoE fitted to the blobs, in float64: products of differently shaped batches then round
    alike."""
    torch.manual_seed(seed)
    arguments = {"moe_layers": (1,), "num_experts": 4, "channels": 1, "classifier": "gap"} | options
    return fit(VMoE(12, 4, 24, 2, 2, 32, 4, **arguments), images, labels).double()


@_fitted_once
def mlp(images, labels, seed=0, width=32):
    torch.manual_seed(seed)
    classes, dim = int(labels.max()) + 1, images[0].numel()
    model = nn.Sequential(nn.Flatten(), nn.Linear(dim, width), nn.GELU(), nn.Linear(width, classes))
    return fit(model, images, labels).double()


class Fragile(nn.Module):
    """Of the first pixel alone; what autocast sees falls earlier than what full precision sees."""

    def forward(self, x):
        moved = x[:, :1]
        limit = 0.15 if torch.is_autocast_enabled("cpu") else 0.35
        return torch.cat([torch.full_like(moved, limit), moved], 1)
