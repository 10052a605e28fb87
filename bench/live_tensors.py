"""Counts the bytes of live tensors, and their peak: a memory measurement that a CPU can make.

Every storage that an operation reads or returns counts from then on until Python and autograd drop it; views count once. This is what
`torch.cuda.max_memory_allocated` counts on a GPU, except for what a kernel allocates and frees inside one operation (workspaces of
cuBLAS, of attention and of sorting) and for the fragments and rounding of the caching allocator. The resident size of the process would
be no better: malloc keeps what was freed, and pages of mapped files come and go.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """A mode inside which the bytes of all tensors in use are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}  # by the address of the storage's C++ object, which no other storage has while it lives

    def add(self, tensor: Any) -> None:
        """Count a tensor that no operation has read yet."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[storage._cdata] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_iter((args, kwargs, output)):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return output


def measure_saved_bytes(compute: Any, model: Any) -> tuple[int, Any]:
    """Bytes that autograd keeps for the backward pass of `compute()`, without the model's own tensors; and what `compute` returned."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = compute()
    return sum(storage.nbytes() for storage in saved.values()), output
