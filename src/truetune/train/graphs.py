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
    if not _fit(trainer, activations):
        return "packs that are too short for them need their own activations beside, for which there is no room"
    return None


def shortest_pack(trainer: Any) -> int:
    """Tokens of the shortest pack that is worth being filled up. Where rows are packed, few are short, and none of half
    the budget: what they would need beside the graphs costs more than their zeros."""
    return int(trainer.token_budget() * (0.5 if trainer.packs else SHORTEST))


def _fit(trainer: Any, activations: Any) -> bool:
    """Whether the largest pack that is too short, and an evaluation, fit beside the graphs' memory."""
    memory, room = activations.memory, activations.room
    peak = memory.peak(activations.plan.choices)
    beside = round((peak - memory.held) * shortest_pack(trainer) / trainer.token_budget())
    evaluates = trainer.largest_batch(evaluation=True) if trainer.eval_dataset is not None else None
    if evaluates is not None:
        tokens = evaluates["input_ids"].numel()
        beside = max(beside, memory.evaluation_peak(tokens, trainer.evaluates_with_logits()) - memory.held)
    # Autograd gets copies of the graphs' gradients, and adds them to those of earlier micro-batches.
    in_graphs = memory.model.gradients * (2 if memory.accumulates else 1)
    return peak + in_graphs + beside + MARGIN * room.device <= room.available


def report_graphs(trainer: Any) -> bool:
    """Adds a line to the trainer's report, on a GPU; says whether there will be graphs."""
    report = trainer.report
    report.lines = [line for line in report.lines if line.part != _PART]  # of an earlier training
    if trainer.args.device.type != "cuda" or report.stock or trainer.activations is None:
        return False
    why = why_no_graphs(trainer)
    packs = f"of {trainer.token_budget():,} tokens, all layers but the last"
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
    longest, recorder = trainer.args.max_length or tokens, Recorder(trainer.args.device)
    graphs = LayerGraphs(layers, tokens, longest, shortest_pack(trainer), recorder, trainer.document_capacity())
    try:
        yield
    finally:
        graphs.release()
        line = next((line for line in trainer.report.lines if line.part == _PART), None)
        if line is not None:
            ran = f"{graphs.replays} packs ran in them"
            line.why = ran if graphs.why_off is None else f"{ran}, then none: {graphs.why_off}"
