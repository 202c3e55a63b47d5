"""The images that the checks look at, and what they ask the model about them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ironmoe.attacks.balls.elements import Bounds, Box, box_at, of_images
from ironmoe.attacks.engine.attacked_model import Answer, AttackedModel
from ironmoe.attacks.evaluation.report import Flag
from ironmoe.attacks.goals.goal import Goal
from ironmoe.attacks.losses import margin
from ironmoe.attacks.model_errors import NoGradient, check_graph, taking_gradients
from ironmoe.attacks.random import example_keys, uniform

# Noise of this size, as a share of a pixel's range, is too small for an input rounded to 8 bits.
FINE = 2.0**-10


class Sample(NamedTuple):
    """B images with what belongs to them, and the model that is looked at.

    model: the model, in full precision
    goal: what the attacks are after
    images: (B, …)
    columns: name → (B, …); "label", and further inputs of the model
    recorded: name → (B, …); what the routing mode of the search keeps of the images
    """

    model: AttackedModel
    goal: Goal
    images: Tensor
    columns: Mapping[str, Tensor]
    recorded: Mapping[str, Tensor] = {}

    @property
    def labels(self) -> Tensor:
        """(B, …)"""
        return self.columns["label"]

    def predict(self) -> Tensor:
        """The outputs (B, …) for the images."""
        return self.model.predict(self.images, self.columns)

    def part(self, places: Tensor | slice) -> "Sample":
        """Some of the images, or all of them in another order."""
        return self._replace(
            images=self.images[places],
            columns={name: column[places] for name, column in self.columns.items()},
        )

    def box(self, bounds: Bounds) -> Box:
        """Lowest and highest valid pixels: two numbers, or two tensors that broadcast to the
        images."""
        if "low_bound" in self.columns:
            low, high = self.columns["low_bound"], self.columns["high_bound"]
            return low.to(self.images), high.to(self.images)
        shape = tuple(self.images.shape[1:])
        lowest, highest = (of_images(bound, shape, slice(None)) for bound in bounds)
        return box_at(self.images, (lowest, highest))

    def with_recorded_routing(self) -> "Sample":
        """The same, with what questions need that have a gradient."""
        return self._replace(recorded=self.model.record(self.images, self.columns))

    def height(self, outputs: Tensor) -> Tensor:
        """(B,) one number that the outputs come to: the margin of logits, else a sum of all of them
        with random signs. (The loss of another goal may have its minimum at the images.)"""
        if self.goal.has_classes:
            return margin(outputs, self.labels)
        return (flat(outputs) * self._signs(outputs)).sum(1)

    def size(self, outputs: Tensor) -> Tensor:
        """(B,) float64: the height is rounded like numbers of this size."""
        values = flat(outputs).double()
        if self.goal.has_classes:
            return values.topk(min(2, values.shape[1]), dim=1).values.abs().amax(1)
        return values.norm(dim=1)

    def nearby(self, size: float, bounds: Bounds) -> Tensor:
        """(B, …) the images with uniform noise, the same in each call, inside the box; ``size`` is
        a share of the range that a pixel has among the images."""
        keys = example_keys(0, torch.arange(len(self.images), device=self.images.device), 0)
        noise = 2 * uniform(keys, tuple(self.images.shape[1:]), self.images.dtype) - 1
        spread = self.images.amax(0) - self.images.amin(0)
        return (self.images + size * noise * spread).clamp(*self.box(bounds))

    def heights(self, points: Tensor) -> Tensor:
        """(B,) ``height`` at these points in the images' places, as the search sees it."""
        return self._ask(points, self.height, want_grad=False).loss

    def ask(
        self, loss: Callable[[Tensor], Tensor], points: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B,) the loss of the outputs for the images, or for points in their places, and (B, …)
        its gradient.

        Raises:
            NoGradient: the model has none.
        """
        answer = self._ask(self.images if points is None else points, loss, want_grad=True)
        assert answer.grad is not None
        return answer.loss, answer.grad

    def outputs_with_graph(self, points: Tensor) -> Tensor:
        """The outputs for points that require a gradient.

        Raises:
            NoGradient: the outputs do not depend on them.
        """
        with taking_gradients(points, lambda same: self.model.logits(same, self.columns)):
            outputs = self.model.logits(points, self.columns)
        check_graph(outputs)
        return outputs

    def _signs(self, outputs: Tensor) -> Tensor:
        """(1, D) −1 or 1, the same in each call."""
        key = example_keys(1, torch.zeros(1, dtype=torch.int64, device=outputs.device), 0)
        return uniform(key, (flat(outputs).shape[1],), outputs.dtype).sub(0.5).sign()

    def _ask(self, points: Tensor, loss: Callable[[Tensor], Tensor], *, want_grad: bool) -> Answer:
        attempts = {"point": points, **self.columns, **self.recorded}
        return self.model.ask(attempts, lambda outputs, _: loss(outputs), want_grad)


def flat(outputs: Tensor) -> Tensor:
    """Outputs (B, …) or (B,) as (B, D)."""
    return outputs.reshape(len(outputs), -1)


def no_gradient(name: str, error: NoGradient) -> Flag:
    """What a check that needs a gradient says of a model that has none."""
    return Flag.not_looked_at(name, f"the model has no gradient ({error.why}).")
