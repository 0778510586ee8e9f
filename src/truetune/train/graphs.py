"""CUDA graphs of a run's layers: where they can be had, and for how long."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from truetune.models.adapters import base_model
from truetune.models.attention import capturable
from truetune.models.graphs import SHORTEST, LayerGraphs, Recorder
from truetune.models.plan import MARGIN
from truetune.train.activations import compute_dtype
from truetune.train.config import own_setting

_PART = "CUDA graphs"


def why_no_graphs(trainer: Any) -> str | None:
    """Why this run's layers are launched one by one, or None. It has a GPU and fused layers."""
    activations = trainer.activations
    if not own_setting(trainer.args, "cuda_graphs"):
        return "cuda_graphs=False"
    if trainer.accelerator.num_processes > 1:
        return "there are several processes"
    if torch.are_deterministic_algorithms_enabled():
        return "packs are filled up with zeros, and results are to be the same to the bit"
    if activations is None or set(activations.plan.choices) != {"keep"} or len(activations.layers) < 2:
        return "not all activations are kept"
    if not trainer.unpads:
        return "batches are padded"
    if not capturable(base_model(trainer.model), compute_dtype(trainer.args, trainer.model)):
        return "the attention backend asks the host"
    if not _fit_twice(activations):
        return "batches that are much shorter need their activations beside the graphs', for which there is no room"
    return None


def _fit_twice(activations: Any) -> bool:
    memory, room, choices = activations.memory, activations.room, activations.plan.choices
    peak = memory.peak(choices)
    return 2 * peak - memory.held + MARGIN * room.device <= room.available


def report_graphs(trainer: Any) -> bool:
    """Adds a line to the trainer's report, on a GPU; says whether there will be graphs."""
    report = trainer.report
    report.lines = [line for line in report.lines if line.part != _PART]  # of an earlier training
    if trainer.args.device.type != "cuda" or report.stock or trainer.activations is None:
        return False
    why, tokens = why_no_graphs(trainer), trainer.token_budget()
    packs = f"of packs of {int(SHORTEST * tokens):,} to {tokens:,} tokens, all layers but the last"
    report.add(_PART, "on" if own_setting(trainer.args, "cuda_graphs") else "off", "none" if why else packs, why or "")
    return why is None


@contextmanager
def layer_graphs(trainer: Any, wanted: bool) -> Iterator[None]:
    """Inside, the layers of a trainer's model run as CUDA graphs where `wanted`."""
    if not wanted:
        yield
        return
    tokens = trainer.token_budget()
    layers = trainer.activations.layers[:-1]
    graphs = LayerGraphs(layers, tokens, trainer.args.max_length or tokens, Recorder(trainer.args.device))
    try:
        yield
    finally:
        graphs.release()
