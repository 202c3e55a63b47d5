"""Several routing modes at once, where one of them adds to the loss and another one changes the
gradient."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ironmoe.attacks.engine.attempts import Attempts
from ironmoe.attacks.engine.routing_mode import RoutingMode, Term


class Together(RoutingMode):
    """Does what each of the modes does; their terms add up.

    Raises:
        ValueError: two of the modes keep something of the clean images under one name, as two
            ``RoutingDivergence`` do.
    """

    def __init__(self, *modes: RoutingMode) -> None:
        self.modes = modes
        self.coupled_by_loss = any(mode.coupled_by_loss for mode in modes)
        self.adds_term = any(mode.adds_term for mode in modes)
        self.free_forward = all(mode.free_forward for mode in modes)

    def __repr__(self) -> str:
        return f"Together({', '.join(map(repr, self.modes))})"

    def record(
        self, model: nn.Module, clean: Tensor, ask: Callable[[Tensor], object] | None = None
    ) -> Attempts:
        kept: Attempts = {}
        for mode in self.modes:
            new = mode.record(model, clean, ask)
            if "forwards" in kept and "forwards" in new:
                new["forwards"] = new["forwards"] + kept.pop("forwards")
            if twice := kept.keys() & new.keys():
                raise ValueError(f"modes must keep different things, got {self} with {min(twice)}")
            kept |= new
        return kept

    @contextmanager
    def around(self, model: nn.Module, attempts: Attempts) -> Iterator[Term | None]:
        with ExitStack() as stack:
            each = [stack.enter_context(mode.around(model, attempts)) for mode in self.modes]
            terms = [term for term in each if term is not None]
            yield (lambda: sum((term() for term in terms[1:]), terms[0]())) if terms else None
