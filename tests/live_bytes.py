"""Memory that is in use while tensors are computed, without the temporary memory of kernels."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live storages that operations have returned, and their peak.

    known: tensors that do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.sizes:
                storage = leaf.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
        return result

    def forget(self, key):
        self.live -= self.sizes.pop(key)

    def discount(self, tensor):
        """Stop counting a tensor."""
        key = tensor.untyped_storage()._cdata
        self.live -= self.sizes[key]
        self.sizes[key] = 0
