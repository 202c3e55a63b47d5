"""A process that does not outlive the one that started it."""

import multiprocessing
import os


def end_with_parent() -> None:
    """Wait for the process that started this one, and end with it: killed, it could not end its
    children, which would then go on beside those of the same command when it is given again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
