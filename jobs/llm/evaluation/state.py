"""Context managers that evaluate a model during training without changing the training."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def evaluation_state(model: Any) -> Iterator[None]:  # any model of transformers or peft
    """The model in evaluation mode, without dropout, gradients and gradient checkpointing.

    Afterwards every module and every random number generator is restored, so that training continues as without the evaluation.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    try:
        model.eval()
        for module in checkpointed:
            module.gradient_checkpointing = False
        with preserve_rng_state(), torch.no_grad():
            yield
    finally:
        for module in checkpointed:
            module.gradient_checkpointing = True
        for module, was_training in modes:  # one at a time: some modules may be in evaluation mode during training
            module.training = was_training


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:  # a model of peft
    """Inside, the model is its base. Afterwards the same weights are trained as before."""
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for weight, requires_grad in trained:
            weight.requires_grad_(requires_grad)


@contextmanager
def preserve_rng_state() -> Iterator[None]:
    """Restore the random state of Python, numpy and torch afterwards."""
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
