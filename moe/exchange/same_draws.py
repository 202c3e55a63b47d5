"""Random numbers of ranks that compute one pass together."""

from typing import Any

import torch


class Draws:
    """The generators of torch on CPU and on one device, during one pass of a model.

    A pass begins with ``begin`` and leaves this rank's random state, after ``end``, as it was
    before: whatever the model drew, ranks that drew the same before do so afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators: list[Any] = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index or 0])
        # a new number for each pass
        self.seed = int(torch.randint(2**62, (), generator=torch.default_generator))
        self._states = [generator.get_state() for generator in self._generators]

    def begin(self, seed: int) -> None:
        """Draw what follows from this seed."""
        for generator in self._generators:
            generator.manual_seed(seed)

    def end(self) -> None:
        """Go on where the rank was before the pass."""
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)
