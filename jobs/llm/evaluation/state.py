"""A training that is asked questions and goes on as if nobody had."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluation_state(model: Any) -> Iterator[None]:  # any model of transformers or peft
    """The model ready to answer: no dropout, no gradients, no activations computed twice.

    Afterwards every part of it is as it was, and so is every random number generator: what is trained next does not depend on
    what was asked in between.
    """
    import torch

    modes = [(part, part.training) for part in model.modules()]
    recomputing = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    try:
        model.eval()
        for part in recomputing:
            part.gradient_checkpointing = False
        with preserve_rng_state(), torch.no_grad():
            yield
    finally:
        for part in recomputing:
            part.gradient_checkpointing = True
        for part, was_training in modes:  # one by one: a part may be kept from training while the rest is trained
            part.training = was_training


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Afterwards Python, numpy and torch draw the numbers that they would have drawn without what was done in here."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu:
            torch.cuda.set_rng_state_all(on_gpu)
