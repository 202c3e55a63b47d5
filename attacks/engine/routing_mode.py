"""What the engine asks of a routing mode: how the search of any attack may change the routing.

The engine knows this class alone. Its subclasses, the modes that a user chooses, are in
``ironmoe.attacks.routing``. Predictions that count are made without any mode.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ironmoe.attacks.engine.attempts import Attempts

Term = Callable[[], Tensor]  # after the forward pass: (R,) added to the loss, or a number for all


class RoutingMode:
    """How the search runs the model. The plain one changes nothing."""

    coupled_by_loss = False
    """The loss of one image depends on the others, so whole batches are attacked."""

    adds_term = False
    """The loss that is ascended is not a function of the logits alone."""

    free_forward = True
    """The forward pass of the search is that of the model that judges."""

    def __init_subclass__(cls) -> None:
        """Refuse the former name of an attribute: left unread, it would make verdicts wrong."""
        super().__init_subclass__()
        if "couples" in vars(cls):
            raise TypeError(
                f"{cls.__name__} must say coupled_by_loss where images share a loss, got couples"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def record(
        self, model: nn.Module, clean: Tensor, ask: Callable[[Tensor], object] | None = None
    ) -> Attempts:
        """What attempts keep of their clean images (R, …): tensors (R, …).

        ``ask`` calls the model with images as the search does, normalised and in its precision; by
        default the model itself is called.
        """
        return {}

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        """What surrounds each forward pass of the search, of all attempts at once."""
        yield None
