"""Each of two processes, with another device and other measurements, writes what its trainer made of them.

Run by `test_ranks.py`: the directory with a model's tokenizer, and the one to write to.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from truetune.models.memory import CHOICES
from truetune.models.plan import GIB, Rates, Room
from truetune.train import activations as activations_module
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError
from truetune.train.rehearsal import Rehearsed
from truetune.train.trainer import SFTTrainer

LAYERS = 4
# (peak, before, seconds of a layer) of a rehearsal, by rank.
MEASURED = {
    "another rank's peak": [(100, 40, 0.3), (90, 10, 0.1)],
    "the same": [(70, 50, 0.2), (70, 50, 0.2)],
    "one ran out": [(None, 40, None), (90, 10, 0.1)],
    "both ran out": [(None, 40, None), (None, 10, None)],
    "without a clock": [(100, 40, None), (90, 10, None)],
}
# Of the device and the host, by rank.
DEVICE, NAMES = [94 * GIB, 80 * GIB], ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"]
FREE, RESERVED, ALLOCATED = [60 * GIB, 50 * GIB], [5 * GIB, 3 * GIB], [GIB, 2 * GIB]
HOST_BYTES, HOST_RATE = [200 * GIB, 100 * GIB], [50e9, 5e9]
NEEDED = [0.6, 1.6]  # of what is predicted


def trainer_of(tokenizer: Any, out: Path) -> SFTTrainer:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [3 + i] * 20, "labels": [3 + i] * 20} for i in range(8)])
    args = SFTConfig(
        str(out / "run"), use_cpu=True, bf16=False, report_to=[], max_length=64, per_device_train_batch_size=2,
        per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1, save_strategy="no", preflight="off",
    )  # fmt: skip
    return SFTTrainer(LlamaForCausalLM(config), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def room_and_rates(trainer: SFTTrainer, rank: int) -> dict[str, Any]:
    """As on a GPU, of which this rank's answers are those above."""
    activations = trainer.activations
    assert activations is not None
    before = dict(vars(activations))
    activations.on_gpu, activations.device = True, torch.device("cuda")
    answers: dict[str, Callable[..., Any]] = {
        "synchronize": lambda *_: None,
        "mem_get_info": lambda *_: (FREE[rank], DEVICE[rank]),
        "get_per_process_memory_fraction": lambda *_: 1.0,
        "memory_reserved": lambda *_: RESERVED[rank],
        "memory_allocated": lambda *_: ALLOCATED[rank],
        "get_device_name": lambda *_: NAMES[rank],
    }
    vars(torch.cuda).update(answers)
    vars(activations_module).update(
        host_bytes=lambda: HOST_BYTES[rank], measured_host_rate=lambda device: HOST_RATE[rank]
    )
    room, rates = activations._room(), activations._estimated_rates()
    assert room is not None
    weights = activations.memory.model.weights
    vars(activations).update(before)
    return {"room": astuple(room), "weights": weights, "rates": astuple(rates)}


def rehearsed(trainer: SFTTrainer, needs: float) -> dict[str, Any]:
    """A device on which a step takes `needs` times what is predicted, with room for 1.2 times what `keep` is.

    The layers are taken to be as wide as an 8B model's, so that what they save is what counts.
    """
    activations, tried = trainer.activations, []
    assert activations is not None
    memory = activations.memory
    layer = replace(memory.model.layers[0], hidden=4096, query=4096, key=1024, intermediate=14336, gradients=0)
    model = replace(memory.model, layers=(layer,) * LAYERS)
    activations.memory = memory = replace(memory, model=model, optimizer=0, tokens=2 * 20)
    activations.room = Room(round(1.2 * memory.peak(("keep",) * LAYERS)), 0)
    activations.rates = Rates(1.0, 1.0, 0.5, 0.4, host_rate=1e9, host_bytes=10**15)

    def rehearse(trainer, batch) -> Rehearsed:
        choices = activations.plan.choices
        tried.append(choices)
        memory = replace(activations.memory.before_first_step(), correction=1.0)
        peak = memory.held + round(needs * (memory.peak(choices) - memory.held))
        return Rehearsed(peak if peak <= activations.room.available else None, memory.held, 1.0 + needs)

    vars(activations_module).update(rehearse=rehearse)
    trainer.rehearse()
    plan = activations.plan
    assert set(plan.choices) <= set(CHOICES)
    return {"tried": tried, "choices": plan.choices, "peak": plan.measured_peak, "forward": activations.rates.forward}


def evaluated(trainer: SFTTrainer, fits: bool) -> str:
    """What is said where the evaluation `fits` into this rank's device, or does not."""

    def run_out(*_) -> None:
        raise torch.cuda.OutOfMemoryError

    activations = trainer.activations
    assert activations is not None
    activations.room = Room(10**12, 0)
    handle = None if fits else trainer.model.register_forward_pre_hook(run_out)
    try:
        activations._rehearse_evaluation()
    except TrainError as error:
        return str(error)
    finally:
        if handle is not None:
            handle.remove()
    return ""


def main() -> None:
    tokenizer, out = AutoTokenizer.from_pretrained(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    trainer = trainer_of(tokenizer, out)
    assert trainer.activations is not None and trainer.accelerator.num_processes == 2
    result: dict[str, Any] = {
        "agreed": {
            name: astuple(trainer.activations._agreed(Rehearsed(*found[rank]))) for name, found in MEASURED.items()
        },
        **room_and_rates(trainer, rank),
        "evaluated": [evaluated(trainer, fits=True), evaluated(trainer, fits=rank == 0)],
    }
    result["rehearsed"] = rehearsed(trainer, NEEDED[rank])
    (out / f"{rank}.json").write_text(json.dumps(result))
