"""Counter of the memory that operations take, on tensors with or without data."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counter of the bytes of storages while they live: those that operations make within this context."""

    def __init__(self, uncounted: Iterable[Tensor]):
        """uncounted: tensors that exist before; operations return views of them, or change them in place."""
        super().__init__()
        self.now = self.peak = 0
        self._uncounted = [tensor.untyped_storage() for tensor in uncounted]  # kept, so that no other gets one's id
        self._seen = {id(storage) for storage in self._uncounted}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
