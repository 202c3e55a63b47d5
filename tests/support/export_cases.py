"""Layers and models that are exported: what makes one, and what makes its input."""

import torch
from torch.export import Dim, export

from ironmoe.moe import Capacity, ExpertChoiceRouter, MoE, SoftMoE, TopKRouter, VMoE

D, F, E, K, N = 16, 24, 4, 2, 7
EXAMPLE = 5
# Of the first axis. An expert has from less than 1 row to more than the last bucket on average.
SIZES = (1, 2, 3, 8, 33, 300)


def moe(capacity=None, router=None, **options):
    top_k = K if router is None else None
    return MoE(D, F, E, top_k, capacity=capacity, router=router, **options)


def vmoe(**options):
    model = VMoE(16, 4, D, 2, 2, 32, 5, "last 1", num_experts=E, top_k=K, **options)
    torch.nn.init.normal_(model.head.weight)
    return model


def tokens(count):
    return torch.randn(count, D)


def images_of_tokens(count):
    return torch.randn(count, N, D)


def pixels(count):
    return torch.randn(count, 3, 16, 16)


LAYERS = {
    "tokens": (moe, tokens),
    "images": (moe, images_of_tokens),
    "shared expert": (lambda: moe(activation="swiglu", shared_dim=8, shared_gate=True), tokens),
    "dispatch dtype": (lambda: moe(dispatch_dtype=torch.bfloat16), tokens),
    "capacity": (lambda: moe(Capacity(0.7)), tokens),
    "capacity by priority": (lambda: moe(Capacity(0.7, priority=True)), tokens),
    "capacity of 4 tokens": (lambda: moe(Capacity(0.5, tokens_per_group=4)), tokens),
    "capacity of 2 images": (lambda: moe(Capacity(0.7, images_per_group=2)), images_of_tokens),
    "expert choice": (lambda: moe(router=ExpertChoiceRouter(D, E)), tokens),
    "expert choice of 2 images": (
        lambda: moe(router=ExpertChoiceRouter(D, E, images_per_group=2)),
        images_of_tokens,
    ),
    "SoftMoE": (lambda: SoftMoE(D, F, E, 2), images_of_tokens),
}
MODELS = {
    "token": (vmoe, pixels),
    "gap": (lambda: vmoe(classifier="gap"), pixels),
    "map": (lambda: vmoe(classifier="map"), pixels),
    "conv stem": (lambda: vmoe(stem="conv"), pixels),
    "ensemble": (
        lambda: vmoe(ensemble_size=2, capacity=Capacity(1.0, images_per_group=2)),
        pixels,
    ),
}
ALL = LAYERS | MODELS


def exported(model, example, strict=False):
    first = Dim("T", min=1, max=4096)
    return export(model, (example,), dynamic_shapes=({0: first},), strict=strict)


def quiet(model):
    """Without the noise of training: an exported program draws its own."""
    for module in model.modules():
        if isinstance(module, TopKRouter | ExpertChoiceRouter):
            module.noise_std = 0.0
    return model
