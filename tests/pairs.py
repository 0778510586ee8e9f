"""A small Llama, and our trainer and stock TRL's on equal models."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_length": 96,
}
_OF_THE_CLOCK = ("runtime", "per_second", "preparation_time", "total_flos")


def llama(tokenizer, **overrides):
    torch.manual_seed(0)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **overrides}))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def line(trainer, part):
    return next(line for line in trainer.report.lines if line.part == part)


def assert_same_metrics(ours: dict, theirs: dict) -> None:
    """The same keys in the same order, and the same values but for times."""
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if not any(word in name for word in _OF_THE_CLOCK):
            assert ours[name] == pytest.approx(value, rel=1e-4 if "grad_norm" in name else 1e-5, abs=1e-9), name


def train_alike(*trainers) -> None:
    """Trains ours and stock TRL's, and compares all that they log."""
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
    ours, theirs = trainers
    assert len(ours.state.log_history) == len(theirs.state.log_history) > 0
    for entries in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert_same_metrics(*entries)
