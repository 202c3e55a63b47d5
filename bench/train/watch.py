"""What is looked at during a training so that one which goes wrong is noticed."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ironmoe.attacks.training import CollapseAlarm, OverfittingGuard, RouterCollapseWarning
from ironmoe.attacks.training.method import Alarm
from ironmoe.bench.train.parallel import mean_over_processes
from ironmoe.bench.train.state import Numbers

# Of the guard's state: what the last good check has seen.
LAST = {"last_pgd": torch.bool, "last_eps": torch.float64}


class Watch:
    """Notices routers that collapse, and models that learn to answer a single step alone.

    stopped: whether training must end; messages: what was noticed, for terminal and report.
    """

    def __init__(self, guard: OverfittingGuard | None = None, alarm: Alarm | None = None) -> None:
        """guard: None where the method makes several steps; alarm: that of the method, of which a
        training that goes on later knows what was said already."""
        self.guard = guard
        self.alarm = alarm if isinstance(alarm, CollapseAlarm) else None
        self.stopped = False
        self.messages: list[str] = []

    @contextmanager
    def noticing(self, say: Callable[[str], None]) -> Iterator[None]:
        """Inside the block, warnings of routers that collapse are said at once, and kept."""
        with warnings.catch_warnings():
            show = warnings.showwarning

            def notice(message: Warning | str, category: type[Warning], *place: object) -> None:
                if issubclass(category, RouterCollapseWarning):
                    self._notice(str(message), say)
                else:
                    show(message, category, *place)  # type: ignore[arg-type]

            warnings.simplefilter("always", RouterCollapseWarning)
            warnings.showwarning = notice  # type: ignore[assignment]
            yield

    def _notice(self, message: str, say: Callable[[str], None]) -> None:
        say(message)
        self.messages.append(message)

    def after_epoch(self, say: Callable[[str], None]) -> Numbers:
        """Look, and return the numbers that were seen. Where the guard of one process trips, as
        rounding may have it, training ends in all."""
        if self.guard is None:
            return {}
        verdict = self.guard.check()
        if mean_over_processes(torch.tensor(float(verdict.tripped), device=self._device)) > 0:
            self.stopped = True
            whose = "" if verdict.tripped else "the guard of another process tripped; in this one, "
            self._notice(f"Training was stopped: {whose}{verdict.message}", say)
        return {"one_step": verdict.fgsm, "alignment": verdict.alignment}

    @property
    def _device(self) -> torch.device:
        assert self.guard is not None
        return self.guard.images.device

    @property
    def state(self) -> Numbers:
        """What must be kept to go on, as JSON has it. The guard's copy of good weights is not
        needed: the trainer keeps the best ones."""
        guard = {} if self.guard is None else self.guard.state_dict()
        return {
            "stopped": self.stopped,
            "messages": self.messages,
            "guard": {name: guard[name].tolist() for name in LAST if name in guard},
            "alarm": None if self.alarm is None else self.alarm.state_dict(),
        }

    @state.setter
    def state(self, state: Numbers) -> None:
        self.stopped, self.messages = state["stopped"], list(state["messages"])
        if self.alarm is not None:
            self.alarm.load_state_dict(state["alarm"])
        if self.guard is not None:
            self.guard.load_state_dict(
                {
                    name: torch.tensor(value, device=self._device, dtype=LAST[name])
                    for name, value in state["guard"].items()
                }
            )
