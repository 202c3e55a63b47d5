"""The logits in whatever a model returns."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ironmoe.moe.checkpoints.errors import CheckpointError


def logits_of(output: Any) -> Tensor:
    """The logits (B, C) in the output of a classifier.

    Of a tensor itself; of a dict, a dataclass or an output of transformers what is called "logits",
    else the only float tensor with two axes; of a tuple or list the first such tensor.

    Raises:
        CheckpointError: there is none, or of a dict more than one; it says what there is.
    """
    if isinstance(output, Tensor):
        return output
    named = getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named

    if isinstance(output, tuple | list):
        found = [value for value in output if _may_be_logits(value)]
        if found:
            return found[0]
        raise _no_logits(enumerate(output), type(output))

    fields = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    if isinstance(fields.get("logits"), Tensor):
        return fields["logits"]
    found = [value for value in fields.values() if _may_be_logits(value)]
    if len(found) != 1:
        raise _no_logits(fields.items(), type(output))
    return found[0]


def _may_be_logits(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _no_logits(fields: Iterable[tuple[Any, Any]], kind: type) -> CheckpointError:
    there = [
        f"{name}: {_dtype(value)} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name}: {type(value).__name__}"
        for name, value in fields
    ]
    return CheckpointError(
        "the model must return logits (images, classes), or a dict or tuple with them under "
        '"logits" or as the only float tensor with two axes, got '
        f"{kind.__name__} with {'; '.join(there) or 'nothing'}"
    )


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
