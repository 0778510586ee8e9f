"""Predicted and measured peak memory side by side, for random weights of real shapes. Needs a GPU of 80 GB or more.

    python benchmarks/bench_plan.py [--out benchmarks/results/plan.json] [--only NAME...]

Each recipe runs in a process of its own: four packed rows of 4,096 tokens a step, adapters of rank 16, every token
supervised. `predicted` is the plan's before anything has run, `rehearsed` what the largest batch needed before the
first step, `corrected` the plan after that, and `measured` the peak of the steps after the first, which has the
optimizer's state. Bytes are those that tensors hold (`torch.cuda.max_memory_allocated`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "tie_word_embeddings": False, "max_position_embeddings": 8192,
}  # fmt: skip
QWEN3_06B = {
    "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
RECIPES = {  # name: (shape, method, policy)
    "8B LoRA keep": (LLAMA_8B, "lora", "keep"),
    "8B LoRA lean": (LLAMA_8B, "lora", "lean"),
    "8B LoRA offload": (LLAMA_8B, "lora", "offload"),
    "8B QLoRA lean": (LLAMA_8B, "qlora", "lean"),
    "0.6B LoRA keep": (QWEN3_06B, "lora", "keep"),
    "0.6B LoRA lean": (QWEN3_06B, "lora", "lean"),
    "0.6B full keep": (QWEN3_06B, "full", "keep"),
}
ROWS, LENGTH, STEPS = 4, 4096, 4
GIB = 2**30


def run(name: str) -> dict:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

    from truetune import SFTConfig, load_model
    from truetune.train.recipe_trainer import RecipeTrainer

    shape, method, policy = RECIPES[name]
    fields = dict(shape)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if method == "qlora":
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            del model
            torch.cuda.empty_cache()
            model = load_model(saved, "nf4")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 2048, (ROWS * STEPS * 8,), generator=generator).tolist()
    documents = [torch.randint(3, config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    data = Dataset.from_dict({"input_ids": documents, "labels": documents})
    adapter = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")

    class AfterFirstStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as directory:
        args = SFTConfig(
            output_dir=directory, max_steps=STEPS, per_device_train_batch_size=ROWS, gradient_accumulation_steps=1,
            bf16=True, max_length=LENGTH, optim="adamw_torch_fused", report_to=[], save_strategy="no",
            activation_policy=policy, logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = RecipeTrainer(
            model, args, train_dataset=data, processing_class=tokenizer(), callbacks=[AfterFirstStep()],
            peft_config=None if method == "full" else adapter,
        )  # fmt: skip
        assert trainer.activations is not None
        predicted = trainer.activations.plan.predicted_peak
        trainer.train()
    plan = trainer.activations.plan
    measured = torch.cuda.max_memory_allocated()
    return {
        "recipe": name, "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "in_effect": next(line.in_effect for line in trainer.report.lines if line.part == "activations"),
        "predicted_gib": predicted / GIB, "rehearsed_gib": (plan.measured_peak or 0) / GIB,
        "corrected_gib": plan.predicted_peak / GIB, "measured_gib": measured / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB, "correction": plan.correction,
        "predicted_over_measured": predicted / measured, "rates": vars(trainer.activations.rates),
        "terms": plan.terms,
    }  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("RESULT " + json.dumps(run(arguments.one)), flush=True)
        return
    results = []
    print(f"{'recipe':18}{'predicted':>10}{'rehearsed':>10}{'corrected':>10}{'measured':>10}{'ratio':>7}  GiB")
    for name in arguments.only:
        done = subprocess.run([sys.executable, __file__, "--one", name], capture_output=True, text=True)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{name:18} failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        row = json.loads(found[-1].removeprefix("RESULT "))
        results.append(row)
        numbers = [row[f"{key}_gib"] for key in ("predicted", "rehearsed", "corrected", "measured")]
        print(f"{name:18}" + "".join(f"{n:10.2f}" for n in numbers) + f"{row['predicted_over_measured']:7.3f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
