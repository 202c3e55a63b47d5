"""Several processes on one study. Each takes what nobody works on, and tells what it finished."""

import multiprocessing
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ironmoe.bench.common.processes import GOES_ON, deaf_to_interrupts, end_with_parent
from ironmoe.bench.common.user_error import UserError
from ironmoe.bench.study.options import StudyOptions
from ironmoe.bench.study.work.group import WorkGroup
from ironmoe.bench.study.work.tasks import Study, one_thread
from ironmoe.bench.study.work.worker import Done

LOOK_SECONDS = 1.0


class WorkerFailed(UserError):
    """A process of the study failed; the message has its error."""


def work(study: Study, group: WorkGroup, tell: Callable[[Done], None]) -> None:
    """Do everything that is left; ``tell`` is called in this process. Under torchrun the groups of
    processes do it, of which this one is in the first; else it is done in
    ``study.options.processes`` processes.

    Raises:
        WorkerFailed: a process failed, or all were killed. What was finished is saved.
    """
    if group.store is not None:
        _in_groups(study, group, tell)
        return
    if study.options.processes == 1:
        study.worker().run(study.tasks, tell)
        return

    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    told: Any = context.Queue()
    children = [
        context.Process(target=_child, args=(study.options, study.folder, told), daemon=True)
        for _ in range(study.options.processes)
    ]
    try:
        with deaf_to_interrupts():
            for child in children:
                child.start()
        _listen(children, told, tell)
    finally:
        for child in children:
            if child.pid is not None:  # it was started
                child.terminate()
                child.join()


def _in_groups(study: Study, group: WorkGroup, tell: Callable[[Done], None]) -> None:
    """Work in the first group, and pass on what the others have finished whenever this one has."""

    def tell_all(done: Done) -> None:
        tell(done)
        for other in group.left():
            tell(other)

    study.worker(group).run(study.tasks, tell_all)
    for other in group.left():
        tell(other)


def _listen(children: Sequence[BaseProcess], told: Any, tell: Callable[[Done], None]) -> None:
    """Pass on what children tell until all have ended. The work of a child that is killed is taken
    over by the others."""
    while True:
        alive = any(child.is_alive() for child in children)
        try:
            message = told.get(timeout=LOOK_SECONDS if alive else 0.1)
        except queue.Empty:
            if alive:
                continue
            break
        if isinstance(message, str):
            raise WorkerFailed(message)
        tell(message)

    if not any(child.exitcode == 0 for child in children):
        codes = ", ".join(str(child.exitcode) for child in children)
        raise WorkerFailed(f"all processes were ended from outside (exit codes {codes}). {GOES_ON}")


def _child(options: StudyOptions, folder: Path, told: Any) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        with one_thread():
            study = Study(options, folder)
            study.worker().run(study.tasks, told.put)
    except Exception as error:
        known = isinstance(error, UserError | OSError)
        what = f"{error}" if known else traceback.format_exc()
        told.put(f"a process of the study failed: {what}. {GOES_ON}")
