"""Whether Triton can compile kernels in this process."""

import os
from importlib.util import find_spec

from ironmoe.bench.common.user_error import UserError

INSTALL_TRITON = "pip install 'triton>=3.6,<3.10' (Linux)"


def check_compiler(option: str) -> None:
    """``option``: of the command line, which needs the compiler.

    Raises:
        UserError: Triton is not installed, or interprets kernels.
    """
    if find_spec("triton") is None:
        raise UserError(f"{option} needs Triton, which is not installed: {INSTALL_TRITON}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError(
            f"{option} cannot compile kernels while TRITON_INTERPRET=1 has them interpreted; unset "
            "it"
        )
