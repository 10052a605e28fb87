"""`python -m jobs.llm.llama_cpp.convert MODEL_FOLDER OPTIONS…`: llama.cpp's own converter, in the memory of a few rows.

The converter widens a whole matrix to float32 and rounds it again: for Gemma's embeddings that is five times their size, and most of
its time. A matrix that it takes as it lies in the file is read, rounded and written some rows at a time instead, with the means that
the converter has for very large tables. Every other tensor, and all that is not a tensor, goes the converter's own way, and the file
is the same, byte by byte.
"""

# Any: the converter's modules are on no environment's path, and unknown to type checkers

import runpy
import sys
from importlib import import_module
from typing import Any

from jobs.llm.llama_cpp import LLAMA_CPP_FOLDER, get_converter_path

CHUNK_BYTES = 16 << 20
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def main(*arguments: str) -> None:
    """Convert; ends the process as the converter does."""
    for folder in (LLAMA_CPP_FOLDER, LLAMA_CPP_FOLDER / "gguf-py"):  # before any gguf that is installed
        sys.path.insert(0, str(folder))
    patch_lazy_tensor(import_module("conversion.base").LazyTorchTensor, import_module("gguf"))
    sys.argv = [str(get_converter_path()), *arguments]
    runpy.run_path(str(get_converter_path()), run_name="__main__")


def patch_lazy_tensor(lazy: Any, gguf: Any) -> None:
    """Let the converter's lazy tensors remember where in which file they lie, for as long as nothing changes their numbers."""
    import torch

    from_local_tensor, plain_numpy, getitem = lazy.from_local_tensor.__func__, lazy.numpy, lazy.__getitem__
    in_rows = make_row_streamed_tensor_class(gguf)

    def remembering(cls: Any, tensor: Any) -> Any:
        made = from_local_tensor(cls, tensor)
        made.local_tensor = tensor
        return made

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = lazy._wrap_fn(lambda tensor, *args, **kwargs: tensor.to(*args, **kwargs), use_self=self)(*args, **kwargs)
        if args == (torch.float32,) and not kwargs:  # what every matrix goes through
            made.local_tensor = self.__dict__.get("local_tensor")
        return made

    def first_rows(self: Any, index: Any) -> Any:
        made = getitem(self, index)
        if isinstance(index, slice) and index.start is None and index.step is None:
            made.local_tensor = self.__dict__.get("local_tensor")
        return made

    def numpy(self: Any) -> Any:
        place = self.__dict__.get("local_tensor")
        if place is None or place.dtype not in TORCH_DTYPES or len(self.shape) != 2 or sys.byteorder != "little":
            return plain_numpy(self)
        return in_rows(place, tuple(self.shape), "float32")

    lazy.from_local_tensor, lazy.to, lazy.__getitem__, lazy.numpy = classmethod(remembering), to, first_rows, numpy


def make_row_streamed_tensor_class(gguf: Any) -> Any:
    """The kind of tensor that the converter writes in pieces, for a matrix in a safetensors file."""
    import numpy as np
    import torch

    kinds = gguf.GGMLQuantizationType
    exact = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}

    class RowStreamedTensor(gguf.LazyChunkedTensor):
        """Rows from `place`, a `LocalTensor`; rounded as torch does, which is as llama.cpp does."""

        def __init__(self, local_tensor: Any, shape: tuple[int, ...], dtype: Any, qtype: Any = None) -> None:
            super().__init__([], shape, dtype, qtype)
            self._local_tensor = local_tensor

        def quantize(self, qtype: Any) -> Any:
            described = super().quantize(qtype)
            return RowStreamedTensor(self._local_tensor, described.shape, described.dtype, qtype)

        def tofile(self, file: Any) -> None:
            for rows in self._iter_rows():
                kind = exact.get(self._qtype)
                if kind is None:
                    gguf.quants.quantize(rows.to(torch.float32).numpy(), self._qtype).tofile(file)
                else:
                    rows.to(kind).view(torch.uint8).numpy().tofile(file)

        def _iter_rows(self) -> Any:
            stored, span = getattr(torch, TORCH_DTYPES[self._local_tensor.dtype]), self._local_tensor.data_range
            width, left = self._local_tensor.shape[1], self.shape[0]
            at_once = max(1, CHUNK_BYTES // (width * stored.itemsize))
            with open(span.filename, "rb") as source:
                source.seek(span.offset)
                while left:
                    count = min(at_once, left)
                    numbers = np.fromfile(source, dtype=np.uint8, count=count * width * stored.itemsize)
                    yield torch.from_numpy(numbers).view(stored).reshape(count, width)
                    left -= count

    return RowStreamedTensor


if __name__ == "__main__":
    main(*sys.argv[1:])
