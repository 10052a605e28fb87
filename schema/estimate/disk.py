"""How large a checkpoint is, and how long saving it takes."""

ADAM_COPIES = 3  # of a trained weight in a checkpoint: itself and Adam's two moments, by the definition of Adam

# How fast a checkpoint is written and uploaded, assumed until the first one has been saved: a conservative guess, not measured.
ASSUMED_SAVE_BYTES_PER_S = 50e6


def estimate_checkpoint_bytes(trained_weights_bytes: int) -> int:
    """Size of a full checkpoint: the trained weights and the optimizer's state."""
    return ADAM_COPIES * trained_weights_bytes


def estimate_save_s(checkpoint_bytes: int) -> float:
    """Seconds that writing and uploading a checkpoint takes, before any was measured."""
    return checkpoint_bytes / ASSUMED_SAVE_BYTES_PER_S
