"""A launch as Triton's just-in-time compiler would specialise it for a GPU that need not be here.

Sizes of 1 and None become constants, multiples of 16 and aligned addresses are known to be such,
and AMD's compiler also knows which tensors lie within 2 GB. The compiler's own code decides, so
what the compile report compiles is what a GPU would run.
"""

from functools import cache
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ironmoe.kernels.gpu.launch import Launch
from ironmoe.kernels.tuning import Chip


class Specialization(NamedTuple):
    """What the compiler is told of the arguments. Paths of constants and attributes are (position
    of the parameter,).
    """

    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for launches of one kernel that compile to the same code."""
        attributes = ((path, str(found)) for path, found in self.attributes.items() if found)
        return tuple(self.signature.values()), tuple(self.constants.items()), tuple(attributes)


def target_of(chip: Chip) -> GPUTarget:
    """The name that Triton has for ``chip``."""
    if chip.name.startswith("gfx"):
        return GPUTarget("hip", chip.name, chip.warp_size)
    return GPUTarget("cuda", int(chip.name.removeprefix("sm_")), chip.warp_size)


def specialize(launch: Launch, chip: Chip) -> Specialization:
    """What ``launch`` would tell the compiler on ``chip``. Its tensors may be meta tensors, whose
    addresses count as aligned.
    """
    backend, bind = _binder(launch.kernel, chip)
    bound, found, options = bind(**launch.arguments)
    _, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, found, options
    )
    return Specialization(signature, constants, attributes)


def source_of(launch: Launch, chip: Chip) -> ASTSource:
    """``launch`` as ``triton.compile`` takes it."""
    return ASTSource(launch.kernel, *specialize(launch, chip))


@cache
def _binder(kernel: Any, chip: Chip) -> tuple[Any, Any]:
    """The backend, and the function that Triton generates for a kernel's arguments: it finds the
    type of each and what is known of it.
    """
    backend = make_backend(target_of(chip))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)
