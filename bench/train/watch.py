"""What is looked at after each epoch so that a training which goes wrong is noticed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ironmoe.attacks.training import RouterCollapseWarning

Numbers = dict[str, Any]


class Verdict(Protocol):
    """What a guard says: accuracies under FGSM and PGD, whether training must stop, and why."""

    tripped: bool
    message: str
    fgsm: float
    pgd: float


class Guard(Protocol):
    """The guard of single-step methods."""

    def check(self) -> Verdict:
        """Attack the held-out images."""

    def state_dict(self) -> Numbers:
        """What must be kept to go on."""

    def load_state_dict(self, state: Numbers) -> None:
        """Go on."""


class Watch:
    """stopped: whether training must end; messages: what was noticed, for terminal and report."""

    def __init__(self, guard: Guard | None = None) -> None:
        self.guard = guard
        self.stopped = False
        self.messages: list[str] = []

    @contextmanager
    def noticing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Inside the block, warnings of routers that collapse are said and kept."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RouterCollapseWarning)
            yield
        for each in caught:
            if issubclass(each.category, RouterCollapseWarning):
                self._notice(str(each.message), say)
            else:
                warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)

    def _notice(self, message: str, say: Callable[[str], None]) -> None:
        say(message)
        self.messages.append(message)

    def after_epoch(self, say: Callable[[str], None]) -> Numbers:
        """Look, and return the numbers that were seen."""
        if self.guard is None:
            return {}
        verdict = self.guard.check()
        if verdict.tripped:
            self.stopped = True
            self._notice(verdict.message, say)
        return {"guard_fgsm": verdict.fgsm, "guard_pgd": verdict.pgd}

    @property
    def state(self) -> Numbers:
        """What must be kept to go on."""
        guard = {} if self.guard is None else self.guard.state_dict()
        return {"stopped": self.stopped, "messages": self.messages, "guard": guard}

    @state.setter
    def state(self, state: Numbers) -> None:
        self.stopped, self.messages = state["stopped"], list(state["messages"])
        if self.guard is not None:
            self.guard.load_state_dict(state["guard"])
