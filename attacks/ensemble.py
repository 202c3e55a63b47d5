"""Several models searched on together, so that what is found fools a model that is none of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

By = Literal["loss", "logits"]


class Ensemble(nn.Module):
    """The mean of several models: a model of its own, and a source of transfer attacks (Liu et al.,
    arXiv 1611.02770; Dong et al., arXiv 1710.06081, section 3.4).

    As a model it gives the mean of the models' outputs: of their logits. An attack that searches on
    it raises the loss of the mean logits, or with ``by="loss"`` the mean of the models' losses. The
    latter lets no model outvote the others by the size of its logits. Where the loss is a
    difference of logits, both are the same.

    One pass of the ensemble is a pass of each of its models.

    Args:
        models: callables from images (B, …) to outputs of one shape, such as logits (B, C), or to
            objects that have them as ``.logits``. Those that are an nn.Module go into eval mode
            with the ensemble.
        by: "logits" or "loss".

    Raises:
        ValueError: no model; ``by`` is something else.
        TypeError: a model that cannot be called.
    """

    def __init__(self, models: Sequence[Callable[..., Any]], by: By = "logits") -> None:
        super().__init__()
        models = list(models)
        if not models:
            raise ValueError("models must hold at least one model, got none")
        for place, model in enumerate(models):
            if not callable(model):
                raise TypeError(f"models[{place}] must be callable, got {type(model).__name__}")
        if by not in ("logits", "loss"):
            raise ValueError(f"by must be 'logits' or 'loss', got {by!r}")

        self.by = by
        self.models = models
        self.members = nn.ModuleList([model for model in models if isinstance(model, nn.Module)])

    def each(self, images: Tensor, *inputs: Tensor, **named: Tensor) -> Tensor:
        """(B, M, …) the outputs of each of the M models."""
        answers = [model(images.clone(), *inputs, **named) for model in self.models]
        outputs = [getattr(answer, "logits", answer) for answer in answers]
        shapes = [tuple(output.shape) for output in outputs]
        if len(set(shapes)) > 1:
            raise ValueError(f"models must give outputs of one shape, got {shapes}")
        return torch.stack(outputs, 1)

    def forward(self, images: Tensor, *inputs: Tensor, **named: Tensor) -> Tensor:
        """(B, …) the mean of the models' outputs."""
        return self.each(images, *inputs, **named).mean(1)

    def called_modules(self) -> list[nn.Module]:
        """What ``ironmoe.moe.distributed.in_step`` looks after: some attacks call the models, and
        not the ensemble."""
        return list(self.members)

    def extra_repr(self) -> str:
        """The models that print themselves are left out."""
        others = [model for model in self.models if not isinstance(model, nn.Module)]
        names = [getattr(model, "__qualname__", type(model).__qualname__) for model in others]
        return ", ".join([f"by={self.by!r}", *names])
