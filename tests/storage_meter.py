"""How many bytes of tensor storage are alive, counted as they are allocated and freed."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class StorageMeter(TorchDispatchMode):
    """Within the block, `live` bytes are held by storages made in it, and `peak` were since the last `lap`.

    It sees every result of every operator of this thread, backward's on a CPU included.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for storage in _storages((args, kwargs)):
            self._note(storage, 0)  # as far as it is not known, it is older than the block
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            self._note(storage, storage.nbytes())
        return result

    def lap(self):
        """The peak since the last lap."""
        peak, self.peak = self.peak, self.live
        return peak

    def _note(self, storage, size):
        key = storage._cdata
        if key not in self._sizes and storage.nbytes():
            self._sizes[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.live -= self._sizes.pop(key)


def _storages(tree):
    tensors = (value for value in tree_iter(tree) if isinstance(value, torch.Tensor))
    return (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
