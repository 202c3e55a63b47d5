"""The models that are trained here: a V-MoE and the dense ViT of the same compute, which begin with
the same weights wherever they have the same modules."""

from typing import Any

import torch

from ironmoe.bench.common.checkpoints import architecture
from ironmoe.bench.data.in_memory import ImageData
from ironmoe.moe import VMoE

MODELS = {"v-moe": "V-MoE", "vit": "ViT", "wide-v-moe": "wide V-MoE", "wide-vit": "wide ViT"}
"""Name on the command line → name in tables."""
DENSE = {"v-moe": "vit", "wide-v-moe": "wide-vit"}
"""Model with experts → the dense one that it is compared with."""
# as wide as a V-MoE-S: matrix products take most of its time, as in models of real size
WIDE = {"dim": 384, "heads": 6, "mlp_dim": 1536}
WIDE_EXPERTS = {"expert_dim": 768}


def model_arguments(name: str, data: ImageData) -> dict[str, Any]:
    """Keyword arguments of ``VMoE`` for one of MODELS on these data."""
    kind = "V-MoE" if name in DENSE else "ViT"
    arguments = architecture(kind, tuple(data.images.shape[1:]), len(data.classes))
    if MODELS[name] == kind:
        return arguments
    return arguments | WIDE | (WIDE_EXPERTS if name in DENSE else {})


def new_model(name: str, data: ImageData, seed: int) -> VMoE:
    """One of MODELS with the initial weights of this seed.

    Experts and routers are drawn for themselves; all other weights of a V-MoE are those of the ViT
    of the same seed. So two models of one seed differ in nothing but their experts.
    """
    torch.manual_seed(seed)
    dense = VMoE(**model_arguments(DENSE.get(name, name), data))
    if name not in DENSE:
        return dense

    model = VMoE(**model_arguments(name, data))
    own = model.state_dict()
    shared = {
        key: weight
        for key, weight in dense.state_dict().items()
        if key in own and own[key].shape == weight.shape
    }
    model.load_state_dict(shared, strict=False)
    return model
