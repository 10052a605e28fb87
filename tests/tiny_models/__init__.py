"""Tiny models with random weights, one for each architecture of the matrix: `build_tiny_model` writes model and tokenizer.

The sizes are small and everything else is the architecture's own: its layers, its attention, its head, its special tokens and, where TRL
ships it, its chat template. `tests/jobs/matrix.py` trains and exports all of them.
"""

from tests.tiny_models.architectures import ARCHITECTURES, TinyArchitecture
from tests.tiny_models.build import build_tiny_model

__all__ = ["ARCHITECTURES", "TinyArchitecture", "build_tiny_model"]
