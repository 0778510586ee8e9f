"""A small trainer on real rows, ready to be proven."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from truetune import SFTConfig, SFTTrainer

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def make(tokenizer, gsm8k_rows, tmp_path):
    """make(model_type or model, lora=True, adapter=None, sizes={}, rows=None, evaluate=False, **fields) -> trainer"""

    def make(model_type="llama", *, lora=True, adapter=None, sizes=None, rows=None, callbacks=None, evaluate=False,
             **fields):  # fmt: skip
        torch.manual_seed(0)
        tokens = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        model = model_type
        if isinstance(model_type, str):
            sizes = {**SIZES, **(sizes or {})}
            model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **tokens, **sizes)
            )
        eval_rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in gsm8k_rows[24:28]]
        held_out = Dataset.from_list(eval_rows)
        if rows is None:
            rows = [{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in gsm8k_rows[:24]]
        settings = {
            "output_dir": str(tmp_path / "out"), "max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1,
            "bf16": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "max_length": 256, "learning_rate": 1e-3, "packing": True,
        }  # fmt: skip
        if adapter is None and lora:
            adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"])
        return SFTTrainer(
            model=model, args=SFTConfig(**{**settings, **fields}), train_dataset=Dataset.from_list(rows),
            eval_dataset={"a": held_out} if evaluate == "dict" else held_out if evaluate else None,
            processing_class=tokenizer, peft_config=adapter, callbacks=callbacks,
        )  # fmt: skip

    return make


@pytest.fixture
def verdicts():
    def verdicts(proof):
        return {check.name: check.verdict for check in proof.checks}

    return verdicts
