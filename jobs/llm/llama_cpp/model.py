"""A GGUF file loaded by llama.cpp into this process: tokens, logits, greedy generation. For child processes only."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jobs.llm.llama_cpp.log import log_errors_only
from jobs.llm.llama_cpp.vocabulary import GgufVocabulary, read_template

if TYPE_CHECKING:
    import ctypes

    import numpy as np
    from numpy.typing import NDArray


class LlamaError(Exception):
    """A call into llama.cpp failed; the message says which."""


@contextmanager
def open_gguf(path: Path, *, threads: int, context_tokens: int, max_outputs: int, lora: Path | None = None) -> Generator["GgufModel"]:
    """Load a file for sequences of up to `context_tokens`, with logits at up to `max_outputs` positions per call.

    `lora` is an adapter to apply. Raises LlamaError.
    """
    import llama_cpp

    log_errors_only()
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    # A native build crashes in its AMX kernels at the first quantized matrix; portable builds have no such kernels.
    model_params.use_extra_bufts = False
    model_params.n_gpu_layers = 0  # verifying a file needs no GPU, and the GPU's memory may be in use
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise LlamaError(f"{path.name} cannot be loaded")
    try:
        context = llama_cpp.llama_init_from_model(model, _make_context_params(threads, context_tokens, max_outputs))
        if not context:
            raise LlamaError(f"no context of {context_tokens} tokens for {path.name}")
        try:
            if lora is not None:
                _load_lora(llama_cpp, model, context, lora)
            yield GgufModel(llama_cpp, model, context)
        finally:
            llama_cpp.llama_free(context)
    finally:
        llama_cpp.llama_model_free(model)


class GgufModel:
    """A loaded file. It processes one sequence at a time; calls are independent."""

    def __init__(self, llama_cpp: ModuleType, model: "ctypes.c_void_p", context: "ctypes.c_void_p") -> None:
        self._llama = llama_cpp
        self._context = context
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.vocabulary = GgufVocabulary(llama_cpp, self._vocab, read_template(llama_cpp, model))
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def iter_logits(self, ids: Sequence[int], num_positions: int) -> Iterator["NDArray[np.float32]"]:
        """The logits at the last `num_positions` positions of a sequence, one row of shape (vocabulary,) at a time."""
        self._clear_memory()
        self._decode(ids, 0, num_positions)
        for position in range(len(ids) - num_positions, len(ids)):
            yield self._logits_at(position)

    def generate(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The greedy continuation, up to and including an end token."""
        self._clear_memory()
        self._decode(ids, 0, 1)
        generated = [int(self._logits_at(len(ids) - 1).argmax())]
        while len(generated) < max_tokens and not self.vocabulary.is_end_token(generated[-1]):
            self._decode(generated[-1:], len(ids) + len(generated) - 1, 1)
            generated.append(int(self._logits_at(0).argmax()))
        return generated

    def detokenize(self, ids: Sequence[int]) -> str:
        """The tokens as text, without special tokens."""
        return b"".join(token_to_bytes(self._vocab, token) for token in ids).decode(errors="replace")

    def _clear_memory(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int], start: int, num_outputs: int) -> None:
        batch = self._llama.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = i >= len(ids) - num_outputs
            code = self._llama.llama_decode(self._context, batch)
        finally:
            self._llama.llama_batch_free(batch)
        if code != 0:
            raise LlamaError(f"llama_decode of {len(ids)} tokens returned {code}")

    def _logits_at(self, position: int) -> "NDArray[np.float32]":
        import numpy as np

        # A copy: the next call overwrites llama.cpp's buffer.
        return np.ctypeslib.as_array(self._llama.llama_get_logits_ith(self._context, position), shape=(self.vocab_size,)).copy()


def token_to_bytes(vocab: "ctypes.c_void_p", token: int) -> bytes:
    """The text of a token; empty for a control token. The bindings' own method loses tokens of more than 32 bytes."""
    import ctypes

    import llama_cpp

    size = 32
    while True:
        buffer = (ctypes.c_char * size)()
        length = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, False)
        if length >= 0:
            return buffer.raw[:length]
        size = -length


def _load_lora(llama_cpp: ModuleType, model: "ctypes.c_void_p", context: "ctypes.c_void_p", lora: Path) -> None:
    """Apply an adapter at scale 1; it is freed with the model."""
    import ctypes

    adapter = llama_cpp.llama_adapter_lora_init(model, str(lora).encode())
    if not adapter:
        raise LlamaError(f"{lora.name} cannot be loaded with its base")
    adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) != 0:
        raise LlamaError(f"{lora.name} cannot be used with its base")


def _make_context_params(threads: int, context_tokens: int, max_outputs: int) -> "ctypes.Structure":
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context_tokens
    params.n_outputs_max = max_outputs  # a row of logits takes 1 MB for Gemma, and the default reserves one per token
    params.n_threads = params.n_threads_batch = threads
    return params
