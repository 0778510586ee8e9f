"""What FP8 and 4-bit weights cost in learning: LoRA on GSM8K over the same weights in bf16, FP8 and NF4.

    python benchmarks/bench_precision.py --data gsm8k_train.jsonl [--steps 200] [--seeds 0,1,2] [--out FILE]

Two bases: a model of Qwen3-0.6B's shape with random weights, and a small Llama that this script trains first, whose
weights have the outliers that training makes. The reduction is the mean loss of the first ten steps less that of the
last ten; the table says how far each precision's is from bf16's. A seed decides the adapters' first weights and the
order of the rows. `bf16 again` is the first run once more: how far two runs come apart of which nothing differs, but
the order in which a GPU adds.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from bench_gsm8k import build_model

SMALL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True,
}  # fmt: skip
PRECISIONS = ("bf16", "bf16 again", "fp8", "nf4")


def train(
    model, tokenizer, rows: list[dict], steps: int, *, lora: bool, learning_rate: float, length: int, seed: int = 0
):
    """Losses of each step, and the trained model."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    from truetune import SFTConfig, SFTTrainer

    on_gpu = torch.cuda.is_available()
    args = SFTConfig(
        tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=2, learning_rate=learning_rate, bf16=on_gpu,
        use_cpu=not on_gpu, packing=True, max_length=length, logging_steps=1, save_strategy="no", report_to=[],
        lr_scheduler_type="constant_with_warmup", warmup_steps=min(10, steps), disable_tqdm=True, seed=seed,
        rehearse=False, preflight="off",  # which decide nothing here, and take as long as thirty steps
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in rows])
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def reduction(losses: list[float]) -> float:
    return statistics.mean(losses[:10]) - statistics.mean(losses[-10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bases", default="trained,random")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="bf16 first")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch
    import transformers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from truetune import load_model

    precisions = options.precisions.split(",")
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    bases = {"random": Path(tempfile.mkdtemp()), "trained": Path(tempfile.mkdtemp())}
    build_model(bases["random"], options.data)
    tokenizer = AutoTokenizer.from_pretrained(bases["random"])
    if "trained" in options.bases:
        torch.manual_seed(0)
        small = LlamaForCausalLM(LlamaConfig(**SMALL, pad_token_id=0, eos_token_id=2, bos_token_id=None))
        half = len(rows) // 2  # the adapters then learn from rows that the base has not seen
        losses, small = train(small, tokenizer, rows[:half], 2 * options.steps, lora=False, learning_rate=1e-3,
                              length=options.length)  # fmt: skip
        print(f"base: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps", flush=True)
        small.to(torch.bfloat16).save_pretrained(bases["trained"])
        tokenizer.save_pretrained(bases["trained"])
        rows = rows[half:]
    results, bf16 = [], []
    for base in options.bases.split(","):
        for seed in (int(seed) for seed in options.seeds.split(",")):
            for precision in precisions:
                torch.manual_seed(seed)
                model = load_model(bases[base], precision.split()[0])
                losses, _ = train(model, tokenizer, rows, options.steps, lora=True, learning_rate=2e-4,
                                  length=options.length, seed=seed)  # fmt: skip
                bf16 = losses if precision == "bf16" else bf16
                off = reduction(losses) / reduction(bf16) - 1
                distance = statistics.mean(abs(ours - its) for ours, its in zip(losses, bf16, strict=True))
                results.append({"base": base, "seed": seed, "precision": precision, "reduction": reduction(losses),
                                "off": off, "distance": distance, "losses": losses})  # fmt: skip
                print(f"{base:8} seed {seed} {precision:10} loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
                      f"reduction {off:+.2%} of bf16's, losses {distance:.5f} from its", flush=True)  # fmt: skip
                if options.out:
                    record = {
                        "command": "python " + " ".join(sys.argv),
                        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                     "transformers": transformers.__version__},
                        "results": results,
                    }  # fmt: skip
                    options.out.write_text(json.dumps(record, indent=1) + "\n")
        for precision in precisions[1:]:
            offs = [r["off"] for r in results if r["base"] == base and r["precision"] == precision]
            print(f"{base:8} {precision:10} mean of {len(offs)} seeds {statistics.mean(offs):+.2%}", flush=True)


if __name__ == "__main__":
    main()
