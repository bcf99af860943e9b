"""How much memory operations take at once, told from the storages of what they return; no device is asked."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Follow the storages that are made, until they are freed.

    Memory that an operation takes inside and frees before it returns is not seen.

    Args:
        apart_from: Tensors whose memory does not count.

    Attributes:
        peak: The most bytes at once.
        at: The operation after which.
    """

    def __init__(self, apart_from: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._known = {storage_of(tensor) for tensor in apart_from}
        self._present: dict[StorageWeakRef, int] = {}
        self.peak, self.at = 0, ""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        self._present = {storage: size for storage, size in self._present.items() if not storage.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := storage_of(tensor)) not in self._known:
                self._present[storage] = tensor.untyped_storage().nbytes()
        total = sum(self._present.values())
        if total > self.peak:
            self.peak, self.at = total, str(function)
        return result


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """Return a weak reference to the memory of a tensor, equal for tensors that share it."""
    return StorageWeakRef(tensor.untyped_storage())
