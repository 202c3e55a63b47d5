"""The state of averaged weights as whole tensors, whatever number of processes trains."""

from ironmoe.attacks.training import EMA
from ironmoe.bench.train.full_state import full_tensors, load_full_tensors
from ironmoe.bench.train.state import Numbers, Tensors, parted


def averaged_state(average: EMA) -> tuple[Tensors, Numbers]:
    """(copies of the averages in the first process, the numbers). Every process must call it."""
    tensors, numbers = parted(average.state_dict())
    return full_tensors(tensors), numbers


def load_averaged_state(average: EMA, tensors: Tensors, numbers: Numbers) -> None:
    """Set what ``averaged_state`` gave. Every process must call it."""
    own, _ = parted(average.state_dict())  # sharded as the averages are
    load_full_tensors(own, tensors)
    average.load_state_dict(own | numbers)
