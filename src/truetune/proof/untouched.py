"""Trying something with a model that is about to be trained, and leaving no trace of it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from truetune.models.plan import fused_layers


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Random states, gradients, buffers and training modes are afterwards what they were before."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, name, buffer, copy in buffers:
            module._buffers[name] = buffer
            if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                buffer.copy_(copy)
        for module, mode in modes:
            module.training = mode


def forget_failure(model: nn.Module) -> None:
    """After memory ran out: what was on its way to the host, and what the allocator holds."""
    for layer in fused_layers(model):
        host = vars(layer)["activations"].host if "activations" in vars(layer) else None
        if host is not None:
            host.forget()
    forget_memory()


def forget_memory() -> None:
    """Device memory that a trial needed is neither held nor counted any more."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
