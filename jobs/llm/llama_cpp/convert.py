"""`python -m jobs.llm.llama_cpp.convert hf|lora MODEL_FOLDER OPTIONS…`: llama.cpp's own converters, which trust no model.

A dozen modules of the converters load the model's tokenizer with its repository's own code. Here transformers refuses that.

The converter of whole models widens a whole matrix to float32 and rounds it again: for Gemma's embeddings that takes five times their
size, and most of its time. So a matrix that it does not change is read, rounded and written some rows at a time, with the converter's
own class for very large tensors. Everything else is left to the converter, and the output is byte-identical.
"""

# Any: type checkers cannot find the converter's modules, which are not installed as packages

import runpy
import sys
from importlib import import_module
from typing import Any, Literal

from jobs.llm.llama_cpp import LLAMA_CPP_FOLDER, get_converter_path
from jobs.llm.llama_cpp.vocabulary import SETTINGS_OPTION, VocabularySettings
from jobs.llm.remote_code import distrust_model_repositories, forbid_remote_code

CHUNK_BYTES = 16 << 20
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def main(source: Literal["hf", "lora"], *arguments: str) -> None:
    """Run a converter with these command-line arguments; exits the process as the converter does."""
    distrust_model_repositories()
    forbid_remote_code()
    for folder in (LLAMA_CPP_FOLDER, LLAMA_CPP_FOLDER / "gguf-py"):  # before an installed gguf package
        sys.path.insert(0, str(folder))
    if source == "hf":
        patch_lazy_tensor(import_module("conversion.base").LazyTorchTensor, import_module("gguf"))
    settings = [argument.removeprefix(SETTINGS_OPTION) for argument in arguments if argument.startswith(SETTINGS_OPTION)]
    if settings:
        write_vocabulary_settings(import_module("conversion.base").TextModel, VocabularySettings.model_validate_json(settings[0]))
    script = str(get_converter_path(source))
    sys.argv = [script, *(argument for argument in arguments if not argument.startswith(SETTINGS_OPTION))]
    runpy.run_path(script, run_name="__main__")


def write_vocabulary_settings(model_class: Any, settings: VocabularySettings) -> None:
    """Make the converter write these settings after its own; a setting that is the same already keeps its place in the file."""
    prepare_metadata = model_class.prepare_metadata

    def prepare_metadata_with_settings(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare_metadata(self, *args, **kwargs)
        writer = self.gguf_writer
        if settings.adds_bos is not None:
            writer.add_add_bos_token(settings.adds_bos)
            if any("tokenizer.ggml.add_eos_token" in values for values in writer.kv_data):
                writer.add_add_eos_token(False)
        for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), settings.end_token_ids, strict=False):
            add(token)

    model_class.prepare_metadata = prepare_metadata_with_settings


def patch_lazy_tensor(lazy_tensor_class: Any, gguf: Any) -> None:
    """Make the converter's lazy tensors keep their position in the safetensors file while their numbers are unchanged."""
    import torch

    from_local_tensor, original_numpy, getitem = (
        lazy_tensor_class.from_local_tensor.__func__,
        lazy_tensor_class.numpy,
        lazy_tensor_class.__getitem__,
    )
    streamed_tensor = make_row_streamed_tensor_class(gguf)

    def from_local_tensor_with_source(cls: Any, tensor: Any) -> Any:
        result = from_local_tensor(cls, tensor)
        result.local_tensor = tensor
        return result

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = lazy_tensor_class._wrap_fn(lambda tensor, *args, **kwargs: tensor.to(*args, **kwargs), use_self=self)(*args, **kwargs)
        if args == (torch.float32,) and not kwargs:  # the converter's call for every matrix
            result.local_tensor = self.__dict__.get("local_tensor")
        return result

    def first_rows(self: Any, index: Any) -> Any:
        result = getitem(self, index)
        if isinstance(index, slice) and index.start is None and index.step is None:
            result.local_tensor = self.__dict__.get("local_tensor")
        return result

    def numpy(self: Any) -> Any:
        local_tensor = self.__dict__.get("local_tensor")
        if local_tensor is None or local_tensor.dtype not in TORCH_DTYPES or len(self.shape) != 2 or sys.byteorder != "little":
            return original_numpy(self)
        return streamed_tensor(local_tensor, tuple(self.shape), "float32")

    lazy_tensor_class.from_local_tensor = classmethod(from_local_tensor_with_source)
    lazy_tensor_class.to, lazy_tensor_class.__getitem__, lazy_tensor_class.numpy = to, first_rows, numpy


def make_row_streamed_tensor_class(gguf: Any) -> Any:
    """A subclass of the converter's chunked tensor, for a matrix in a safetensors file."""
    import numpy as np
    import torch

    types = gguf.GGMLQuantizationType
    torch_dtypes = {types.F32: torch.float32, types.F16: torch.float16, types.BF16: torch.bfloat16}

    class RowStreamedTensor(gguf.LazyChunkedTensor):
        """The rows of `local_tensor`, gguf's `LocalTensor`, rounded by torch, which rounds as llama.cpp does."""

        def __init__(self, local_tensor: Any, shape: tuple[int, ...], dtype: Any, qtype: Any = None) -> None:
            super().__init__([], shape, dtype, qtype)
            self._local_tensor = local_tensor

        def quantize(self, qtype: Any) -> Any:
            quantized = super().quantize(qtype)
            return RowStreamedTensor(self._local_tensor, quantized.shape, quantized.dtype, qtype)

        def tofile(self, file: Any) -> None:
            for rows in self._iter_rows():
                dtype = torch_dtypes.get(self._qtype)
                if dtype is None:
                    gguf.quants.quantize(rows.to(torch.float32).numpy(), self._qtype).tofile(file)
                else:
                    rows.to(dtype).view(torch.uint8).numpy().tofile(file)

        def _iter_rows(self) -> Any:
            source_dtype, data_range = getattr(torch, TORCH_DTYPES[self._local_tensor.dtype]), self._local_tensor.data_range
            width, rows_left = self._local_tensor.shape[1], self.shape[0]
            chunk_rows = max(1, CHUNK_BYTES // (width * source_dtype.itemsize))
            with open(data_range.filename, "rb") as source:
                source.seek(data_range.offset)
                while rows_left:
                    rows = min(chunk_rows, rows_left)
                    numbers = np.fromfile(source, dtype=np.uint8, count=rows * width * source_dtype.itemsize)
                    yield torch.from_numpy(numbers).view(source_dtype).reshape(rows, width)
                    rows_left -= rows

    return RowStreamedTensor


if __name__ == "__main__":
    main("lora" if sys.argv[1] == "lora" else "hf", *sys.argv[2:])
