"""How many bytes of tensors are alive, counted and not timed, and the largest number so far."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside the block every operation's results are counted while their memory exists.

    peak: the most bytes after any operation; may be set anew.

    Args:
        without: tensors whose memory does not count.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._without = {tensor.untyped_storage()._cdata for tensor in without}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    @property
    def live(self) -> int:
        """Bytes now."""
        self._storages = {
            key: (storage, size)
            for key, (storage, size) in self._storages.items()
            if not storage.expired()
        }
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._without:
                    self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return results
