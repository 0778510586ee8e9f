"""Whole training curves against stock TRL: fp32 on the CPU, the same data and seed, 20 steps.

Every case also asserts from the report that our head, attention and batches ran, so that a subclass which only passes
through to TRL would fail.
"""

import itertools

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

import truetune

STEPS = 20
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "use_cache": False,
}
FAMILIES = {
    "llama": (LlamaConfig, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
    "gemma2": (Gemma2Config, {"sliding_window": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
}
BATCHES = {
    "padded": {"max_length": 96},
    "padding_free": {"padding_free": True, "max_length": None},
    "bfd": {"packing": True, "max_length": 128},
}
# A covering subset of family x method x batches x accumulation, nll; then dft where the paths differ.
CASES = [
    ("llama", "full", "padded", 1, "nll"),
    ("llama", "lora", "padding_free", 2, "nll"),
    ("llama", "lora", "bfd", 1, "dft"),
    ("llama", "full", "bfd", 2, "nll"),
    ("qwen3", "full", "padding_free", 1, "nll"),
    ("qwen3", "lora", "padded", 2, "nll"),
    ("qwen3", "full", "bfd", 2, "dft"),
    ("qwen3", "lora", "bfd", 1, "nll"),
    ("mistral", "full", "bfd", 1, "nll"),
    ("mistral", "lora", "padding_free", 1, "nll"),
    ("mistral", "full", "padded", 2, "dft"),
    ("gemma2", "full", "padding_free", 2, "nll"),
    ("gemma2", "lora", "bfd", 2, "nll"),
    ("gemma2", "full", "padded", 1, "nll"),
]


def make_model(family: str, tokenizer, **kwargs):
    config_class, own = FAMILIES[family]
    config = config_class(
        **SIZE,
        **own,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(1)
    attention = "eager" if family == "gemma2" else "sdpa"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():  # far from uniform, so that logits, caps and probabilities matter
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


def make_data(gsm8k_rows, count: int, start: int = 0) -> Dataset:
    rows = [row for row in gsm8k_rows[start:] if len(row["question"]) + len(row["answer"]) < 300][:count]
    return Dataset.from_list([{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows])


def train(trainer_class, config_class, case, tokenizer, gsm8k_rows, tmp_path, **overrides):
    family, method, batches, accumulation, loss_type = case
    args = config_class(
        **{
            "output_dir": str(tmp_path),
            "max_steps": STEPS,
            "per_device_train_batch_size": 1 if batches == "bfd" else 3,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 2e-3,
            "weight_decay": 0.01,
            "logging_steps": 1,
            "loss_type": loss_type,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "eval_strategy": "steps",
            "eval_steps": 10,
            "disable_tqdm": True,
            "seed": 3,
            "gradient_checkpointing": method == "lora",
            **BATCHES[batches],
            **overrides,
        }
    )
    peft_config = None
    if method == "lora":
        saved = ["embed_tokens"] if FAMILIES[family][1].get("tie_word_embeddings") else ["embed_tokens", "lm_head"]
        peft_config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=saved, task_type="CAUSAL_LM")
    trainer = trainer_class(
        model=make_model(family, tokenizer),
        args=args,
        train_dataset=make_data(gsm8k_rows, 150),
        eval_dataset=make_data(gsm8k_rows, 9, start=2000),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def curve(trainer, name: str) -> torch.Tensor:
    return torch.tensor([entry[name] for entry in trainer.state.log_history if name in entry], dtype=torch.float64)


def worst(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert len(ours) == len(theirs) > 0
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-12)).max())


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_training_follows_stock_trl(case, tokenizer, gsm8k_rows, tmp_path):
    theirs = train(trl.SFTTrainer, trl.SFTConfig, case, tokenizer, gsm8k_rows, tmp_path / "trl")
    ours = train(truetune.SFTTrainer, truetune.SFTConfig, case, tokenizer, gsm8k_rows, tmp_path / "truetune")

    assert worst(curve(ours, "loss"), curve(theirs, "loss")) < 1e-5
    assert worst(curve(ours, "grad_norm"), curve(theirs, "grad_norm")) < 1e-4
    assert worst(curve(ours, "eval_loss"), curve(theirs, "eval_loss")) < 1e-5
    for name in ("entropy", "mean_token_accuracy", "num_tokens", "learning_rate", "eval_entropy", "eval_num_tokens"):
        assert worst(curve(ours, name), curve(theirs, name)) < 1e-4, name
    assert len(curve(ours, "loss")) == STEPS

    report = ours.report
    micro_batches = STEPS * case[3]
    assert report.stock == []
    assert report.fused_losses >= micro_batches
    assert report.packed_batches == report.fused_losses and report.padded_batches == 0
    assert sum(report.attention_calls.values()) >= micro_batches * SIZE["num_hidden_layers"]


def test_the_cases_cover_every_pair():
    """Each family meets each method, batch shape and accumulation; dft meets both methods."""
    pairs = {(case[0], other) for case in CASES for other in case[1:4]}
    wanted = set(itertools.product(FAMILIES, ["full", "lora", *BATCHES, 1, 2]))
    assert wanted <= pairs
    assert {case[1] for case in CASES if case[4] == "dft"} == {"full", "lora"}
