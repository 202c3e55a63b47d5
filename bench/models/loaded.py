"""A model that was loaded, and what is known of it."""

from typing import Any, NamedTuple

from torch import nn

from ironmoe.attacks.data.reading import Pipeline


class LoadedModel(NamedTuple):
    """A model that can be attacked, and what is known of it.

    model: from pixels (B, C, H, W) float32 in [0, 1] to logits (B, classes) float32; it normalizes
        them itself
    name: for people
    image_shape: (C, H, W) if it takes no other
    classes: their names, by index of the logits; None if they are not known
    facts: what report and settings say of it
    source: how the command named it
    identity: what makes it another model beside its weights: the part of the name that does, and of
        a file what is in it
    pipeline: how pictures become pixels for this model; None if the model does not say
    size_key: what, after the question mark of the name, builds a model of one size for another one
    """

    model: nn.Module
    name: str
    image_shape: tuple[int, ...] | None
    classes: list[str] | None
    facts: dict[str, Any]
    source: str = ""
    identity: str = ""
    pipeline: Pipeline | None = None
    size_key: str = ""

    @property
    def preprocessing(self) -> str:
        """One line for people: what happens to a picture, and where that was read."""
        if self.pipeline is None:
            return "the model names no preprocessing"
        source = getattr(self.pipeline, "source", "")
        return f"{self.pipeline}" + (f" ({source})" if source else "")

    def for_size(self, height: int, width: int) -> str:
        """How to get this model for another size, as an error ends; nothing if there is no way."""
        if not self.size_key or (self.image_shape or ())[1:] == (height, width):
            return ""
        side = str(height) if height == width else f"{height}x{width}"
        return (
            f"; {self.size_key}={side} after the question mark of --model builds it for that size"
        )


def facts_of(stem: str, **more: Any) -> dict[str, Any]:
    """The facts of a model that this library did not train."""
    return {"seed": 0, "train_seconds": None, "stem": stem, **more}
