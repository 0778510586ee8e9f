"""Trainers of a small Llama, and what they log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from truetune.train.config import SFTConfig
from truetune.train.recipe_trainer import RecipeTrainer
from truetune.train.trainer import SFTTrainer

LAYERS = 4
LORA = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
DOCUMENTS = Dataset.from_list(
    [{"input_ids": [(7 * i + j) % 97 + 3 for j in range(n)], "labels": [(7 * i + j) % 97 + 3 for j in range(n)]}
     for i, n in enumerate([20, 31, 9, 44, 17, 28, 12, 40, 25, 33, 6, 38])]
)  # fmt: skip


def maker(tokenizer: Any, tmp_path: Path) -> Callable[..., SFTTrainer]:
    def make(trainer_class=RecipeTrainer, peft=None, train_dataset=DOCUMENTS, eval_dataset=None, model=None, **fields):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=4, num_key_value_heads=2, attention_dropout=fields.pop("dropout", 0.0),
        )  # fmt: skip
        settings = {
            "output_dir": str(tmp_path / "out"), "max_steps": 3, "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "bf16": False,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_length": 64,
            "learning_rate": 1e-2, "preflight": "off",  # whose own forward passes are not to be counted
        }  # fmt: skip
        pack = {"pack": fields.pop("pack")} if "pack" in fields else {}
        return trainer_class(
            model or LlamaForCausalLM(config), SFTConfig(**settings | fields), train_dataset=train_dataset,
            eval_dataset=eval_dataset, processing_class=tokenizer, peft_config=peft, **pack,
        )  # fmt: skip

    return make


def logged(trainer) -> list[tuple]:
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def trajectory(trainer) -> list[tuple]:
    trainer.train()
    return logged(trainer)


def line(trainer):
    return next(line for line in trainer.report.lines if line.part == "activations")
