"""How coarsely a model computes, as far as it tells."""

from typing import Any

import torch
from torch import nn


def coarsest_unit(model: Any, dtype: torch.dtype) -> float:
    """The relative size of one unit in the last place, in the lowest precision among that of the
    images (``dtype``), of weights, and of dispatched tokens. Casts in the code of a model, or in a
    callable around it, do not show."""
    dtypes = {dtype}
    if isinstance(model, nn.Module):
        dtypes |= {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
        dispatched = (getattr(module, "dispatch_dtype", None) for module in model.modules())
        dtypes |= {each for each in dispatched if isinstance(each, torch.dtype)}
    return max(torch.finfo(each).eps for each in dtypes)
