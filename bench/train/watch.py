"""What is looked at after each epoch so that a training which goes wrong is noticed."""

from typing import Any, Protocol

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

    def after_epoch(self) -> Numbers:
        """Look, and return the numbers that were seen."""
        if self.guard is None:
            return {}
        verdict = self.guard.check()
        if verdict.tripped:
            self.stopped = True
            self.messages.append(verdict.message)
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
