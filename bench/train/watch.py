"""What is looked at after each epoch so that a training which goes wrong is noticed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ironmoe.attacks.training import OverfittingGuard, RouterCollapseWarning
from ironmoe.bench.train.state import Numbers

LAST = "last_pgd"  # of the guard's state: which images were told right at the last check


class Watch:
    """Notices routers that collapse, and models that learn to answer a single step alone.

    stopped: whether training must end; messages: what was noticed, for terminal and report.
    """

    def __init__(self, guard: OverfittingGuard | None = None) -> None:
        """guard: None where the method makes several steps."""
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
            self._notice(f"Training was stopped: {verdict.message}", say)
        return {"one_step": verdict.fgsm, "alignment": verdict.alignment}

    @property
    def state(self) -> Numbers:
        """What must be kept to go on, as JSON has it. The guard's copy of good weights is not
        needed: the trainer keeps the best ones."""
        last = None if self.guard is None else self.guard.state_dict().get(LAST)
        return {
            "stopped": self.stopped,
            "messages": self.messages,
            "last_right": None if last is None else last.tolist(),
        }

    @state.setter
    def state(self, state: Numbers) -> None:
        self.stopped, self.messages = state["stopped"], list(state["messages"])
        if self.guard is not None and state["last_right"] is not None:
            last = torch.tensor(state["last_right"], device=self.guard.images.device)
            self.guard.load_state_dict({LAST: last})
