"""Damage to a checkpoint, the same for the same random seed. Standard library only, because both environments use it."""

import random
from pathlib import Path
from typing import Literal

Damage = Literal["truncated", "bit flipped", "emptied", "file deleted"]
DAMAGES: tuple[Damage, ...] = ("truncated", "bit flipped", "emptied", "file deleted")


def damage(folder: Path, seed: int, names: tuple[str, ...]) -> tuple[Damage, str]:
    """Damage exactly one file of a checkpoint; return the kind of damage and the file."""
    rng = random.Random(seed)
    kind, name = DAMAGES[seed % len(DAMAGES)], rng.choice(names)
    path = folder / name
    content = bytearray(path.read_bytes())
    match kind:
        case "truncated":
            path.write_bytes(content[: rng.randrange(1, len(content))])
        case "bit flipped":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        case "emptied":
            path.write_bytes(b"")
        case "file deleted":
            path.unlink()
    return kind, name
