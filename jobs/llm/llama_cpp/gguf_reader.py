"""What is in a GGUF file, read without loading it as a model."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def count_weights(path: Path) -> int:
    """How many weights a file holds."""
    from gguf import GGUFReader

    return sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)


def read_imatrix(path: str) -> "dict[str, NDArray[np.float32]]":
    """By tensor: the mean square of each of its inputs, expert after expert where it has several; 1 where an expert never spoke."""
    import numpy as np
    from gguf import GGUFReader

    found = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in GGUFReader(path).tensors}
    means: dict[str, NDArray[np.float32]] = {}
    for name in [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]:
        counts = found[f"{name}.counts"].reshape(-1, 1)
        sums = found[f"{name}.in_sum2"].reshape(len(counts), -1)
        means[name] = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32).flatten()
    return means
