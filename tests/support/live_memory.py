"""How many bytes of tensors are alive, counted and not timed, and the largest number so far."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside the block every operation's results are counted while their memory exists.

    ``live``: bytes now; ``peak``: the most after any operation; ``without``: tensors whose memory
    does not count.
    """

    def __init__(self, without=()):
        super().__init__()
        self._without = {tensor.untyped_storage()._cdata for tensor in without}
        self._storages = {}
        self.peak = 0

    @property
    def live(self):
        self._storages = {
            key: (storage, size)
            for key, (storage, size) in self._storages.items()
            if not storage.expired()
        }
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self._without:
                    continue
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return results
