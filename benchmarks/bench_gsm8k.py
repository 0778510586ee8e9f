"""GSM8K through stock TRL and through truetune: losses at each step, tokens/s and peak memory, in one run.

    python benchmarks/bench_gsm8k.py --data gsm8k_train.jsonl --out benchmarks/results/gsm8k.json [--modes lora,full]

The model has Qwen3-0.6B's shape and random weights, the tokenizer is trained on the data, documents are packed at 4,096
by TRL itself for both. Every system and mode runs in a process of its own, the peers with `--peer-path` in front of
PYTHONPATH (where flash-attn's names are served). `fp32` is stock TRL in fp32: the distance of TRL's own bf16 curve from
it is the yardstick for ours.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ("lora", "qlora", "full", "autocast")
STEPS, WARM_UP = 12, 4


def build_tokenizer(directory: Path, data: Path) -> None:
    """A byte-level BPE tokenizer trained on `data`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2]).save_pretrained(
        directory
    )


def build_model(directory: Path, data: Path) -> None:
    """A model of Qwen3-0.6B's shape with random bf16 weights, and a tokenizer for `data`."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    build_tokenizer(directory, data)
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def train_one(system: str, mode: str, model_dir: str, data: Path) -> dict:
    """Trains in this process and returns losses, tokens/s and peak GiB."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

    ours, fp32 = system == "truetune", system == "fp32"
    if ours:
        from truetune import SFTConfig, SFTTrainer
    else:
        from trl import SFTConfig, SFTTrainer
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    dataset = Dataset.from_list([{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in rows])
    # FlashAttention has no fp32: the reference takes sdpa, whose dense mask keeps documents apart.
    attention = None if ours else "sdpa" if fp32 else "flash_attention_2"
    dtype = torch.float32 if fp32 or mode == "autocast" else torch.bfloat16
    quantization = None
    if mode == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    attention_kwargs = {"attn_implementation": attention} if attention else {}
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=2e-5 if mode in ("full", "autocast") else 2e-4,
        bf16=not fp32,
        packing=True,
        max_length=4096,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=0,
        optim="adamw_torch_fused",
        gradient_checkpointing=fp32,
        disable_tqdm=True,
        model_init_kwargs=attention_kwargs if mode == "autocast" else None,
    )
    if mode == "autocast":
        model = model_dir  # a name: TRL loads it in fp32
    else:
        model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, device_map={"": 0}, quantization_config=quantization, **attention_kwargs
        )
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            if state.global_step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()

    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=lora if mode in ("lora", "qlora") else None,
        callbacks=[Clock()],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = stamps[-1] - stamps[WARM_UP - 1]
    return {
        "system": system,
        "mode": mode,
        "tokens_per_s": round((logs[-1]["num_tokens"] - logs[WARM_UP - 1]["num_tokens"]) / seconds),
        "ms_per_step": round(1e3 * seconds / (STEPS - WARM_UP), 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "losses": [entry["loss"] for entry in logs],
        "grad_norms": [entry["grad_norm"] for entry in logs],
        "report": trainer.report.to_dict() if ours else None,
    }


def compare(runs: dict[tuple[str, str], dict], modes: list[str]) -> list[dict]:
    """For each mode: how far ours is from TRL's bf16 curve, over how far that is from TRL's fp32 curve."""
    table = []
    for mode in modes:
        if any((system, mode) not in runs for system in ("truetune", "trl", "fp32")):
            continue
        ours, trl, fp32 = (runs[system, mode] for system in ("truetune", "trl", "fp32"))
        between = [abs(a - b) for a, b in zip(ours["losses"], trl["losses"], strict=True)]
        rounding = [abs(a - b) for a, b in zip(trl["losses"], fp32["losses"], strict=True)]
        own = [abs(a - b) for a, b in zip(ours["losses"], fp32["losses"], strict=True)]
        table.append(
            {
                "mode": mode,
                "speed_ratio": round(ours["tokens_per_s"] / trl["tokens_per_s"], 2),
                "memory_ratio": round(ours["peak_gib"] / trl["peak_gib"], 2),
                "max_ours_trl": max(between),
                "max_trl_fp32": max(rounding),
                "max_ours_fp32": max(own),
                "mean_ours_trl": statistics.mean(between),
                "mean_trl_fp32": statistics.mean(rounding),
                "steps_over_1.5x": sum(a > 1.5 * b for a, b in zip(between, rounding, strict=True)),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--reuse", type=Path, help="an earlier record, whose fp32 runs (a minute each) are taken over")
    parser.add_argument("--one", nargs=3, metavar=("SYSTEM", "MODE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(train_one(*options.one, options.data)), flush=True)
        return

    model_dir = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    build_model(model_dir, options.data)
    runs: dict[tuple[str, str], dict] = {}
    modes = options.modes.split(",")
    if options.reuse:
        earlier = json.loads(options.reuse.read_text())["runs"]
        runs = {("fp32", run["mode"]): run for run in earlier if run["system"] == "fp32"}
    # The reference first: what is timed then runs side by side.
    order = [("fp32", mode) for mode in modes] + [(system, mode) for mode in modes for system in ("trl", "truetune")]
    for system, mode in order:
        if (system, mode) in runs:
            continue
        if (system, mode) == ("fp32", "autocast") and ("fp32", "full") in runs:
            runs[system, mode] = runs["fp32", "full"]  # the same run: fp32 weights without autocast
            continue
        environment = dict(os.environ)
        if system != "truetune" and options.peer_path:
            environment["PYTHONPATH"] = f"{options.peer_path}:{environment.get('PYTHONPATH', '')}"
        command = [sys.executable, __file__, "--data", str(options.data), "--one", system, mode, str(model_dir)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not result:
            print(f"{system} {mode} failed:\n{done.stderr[-3000:]}", flush=True)
            continue
        run = runs[system, mode] = json.loads(result[-1].removeprefix("RESULT "))
        print({k: run[k] for k in ("system", "mode", "tokens_per_s", "ms_per_step", "peak_gib")}, flush=True)
        if options.out:  # after every run, so that a time limit loses no more than one
            options.out.write_text(json.dumps(record(runs, modes), indent=1) + "\n")
    for line in compare(runs, modes):
        print(line)


def record(runs: dict[tuple[str, str], dict], modes: list[str]) -> dict:
    import torch
    import transformers
    import trl

    return {
        "command": "python " + " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "comparison": compare(runs, modes),
        "runs": list({id(run): run for run in runs.values()}.values()),
    }


if __name__ == "__main__":
    main()
