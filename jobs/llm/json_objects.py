"""Python objects between the processes of one training: sent as JSON, never as pickles."""

import json
from typing import IO, Any


def exchange_objects_as_json() -> None:
    """Make torch's collectives of Python objects send JSON: TRL and accelerate gather and broadcast lists of texts and numbers.

    Raises TypeError where such a collective is given anything else. Every one of them encodes and decodes with these two classes.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d._pickler, distributed_c10d._unpickler = _JsonPickler, _JsonUnpickler


class _JsonPickler:
    """Writes an object as JSON, with the interface of pickle.Pickler."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def dump(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode())


class _JsonUnpickler:
    """Reads what _JsonPickler wrote, with the interface of pickle.Unpickler."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def load(self) -> Any:
        return json.loads(self._file.read())


def encode_json(value: Any) -> Any:
    """A JSON value as a tensor of bytes. Raises TypeError for other values."""
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def decode_json(content: Any) -> Any:
    """The value of a tensor that `encode_json` made."""
    return json.loads(content.numpy().tobytes())
