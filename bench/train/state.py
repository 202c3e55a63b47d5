"""What a training must keep after every epoch to go on: one safetensors file, written whole or not
at all, so that a kill at any moment loses at most one epoch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save
from torch import Tensor

from ironmoe.bench.common.checkpoints import read_safetensors
from ironmoe.bench.common.files import finite, write_atomically

Tensors = dict[str, Tensor]
Numbers = dict[str, Any]


class TrainingState(NamedTuple):
    """A training after some epochs.

    tensors: of each section ("model", "best", "average", "optimizer.all", …), by name; numbers:
    everything else, as JSON has it, for example the curves.
    """

    tensors: dict[str, Tensors]
    numbers: Numbers

    def of(self, section: str) -> Tensors:
        """The tensors of a section; none if it has none."""
        return self.tensors.get(section, {})

    def write(self, file: Path) -> None:
        """Replace the file."""
        named = {
            f"{section}/{name}": tensor.cpu().contiguous()
            for section, tensors in self.tensors.items()
            for name, tensor in tensors.items()
        }
        numbers = json.dumps(finite(self.numbers), allow_nan=False)
        write_atomically(file, save(named, {"numbers": numbers}))


def read_state(file: Path) -> TrainingState | None:
    """What the file holds; None if there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not file.is_file():
        return None
    named, metadata = read_safetensors(file)
    sections: dict[str, Tensors] = {}
    for key, tensor in named.items():
        section, _, name = key.partition("/")
        sections.setdefault(section, {})[name] = tensor
    return TrainingState(sections, json.loads(metadata["numbers"]))


def parted(state: Mapping[str, Any]) -> tuple[Tensors, Numbers]:
    """(the tensors of a flat state, its numbers)."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in state.items() if key not in tensors}
