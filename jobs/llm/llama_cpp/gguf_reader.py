"""Reads the content of GGUF files without loading them as models."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def count_weights(path: Path) -> int:
    """The number of weights in a file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)


def read_imatrix(path: str) -> "dict[str, NDArray[np.float32]]":
    """By tensor name, the mean square of each input, for one expert after another; 1 for an expert that was never used."""
    import numpy as np
    from gguf import GGUFReader

    tensors = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in GGUFReader(path).tensors}
    means: dict[str, NDArray[np.float32]] = {}
    for name in [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]:
        counts = tensors[f"{name}.counts"].reshape(-1, 1)
        sums = tensors[f"{name}.in_sum2"].reshape(len(counts), -1)
        means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32).flatten()
    return means
