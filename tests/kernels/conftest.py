"""What the tests of compiled kernels share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_compiled() -> Callable[..., Any]:
    """What a script prints as JSON, run in a process of its own: in this one the kernels are
    interpreted. Arguments that are no strings are handed over as JSON.
    """

    def run(script: str, *arguments: object) -> Any:
        words = [
            argument if isinstance(argument, str) else json.dumps(argument)
            for argument in arguments
        ]
        environment = {
            name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
        }
        command = [sys.executable, "-c", script, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run
