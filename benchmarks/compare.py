"""truetune beside TRL, Unsloth and Liger on the same step: tokens/s and peak memory as ratios from one run.

    python benchmarks/compare.py --systems truetune,trl,unsloth,liger --recipe 0.6b-lora [--recipe ...] [--out FILE]

Models have real shapes and random weights, made once in `--inputs` (a memory-backed directory is best). Rows are tokens
already: lengths are log-normal (median 350, sigma 0.9, 32 to 4,096), all tokens supervised, but for `-half`. A step is
four packed rows of 4,096. Every system runs its own trainer in a process of its own, 14 steps of which 5 warm up.
`--peer-path` goes in front of PYTHONPATH for the peers (flash-attn's names, where flash-attn itself is not installed).
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

STEPS, WARM_UP, ROWS, LENGTH = 14, 5, 4, 4096
SYSTEMS = ("truetune", "trl", "unsloth", "liger")
HEADER = f"{'':18}{'tokens/s':>10}{'peak GiB':>10}{'truetune:':>12}{'speed':>8}{'memory':>8}"


@dataclass(frozen=True)
class Recipe:
    """`policy`: truetune's `activation_policy`; peers recompute (Unsloth offloads) wherever it is not keep.

    `supervised`: the share of every row, at its end, that is.
    """

    model: str
    method: str
    policy: str
    precision: str = "bf16"
    supervised: float = 1.0


RECIPES = {
    "8b-lora-keep": Recipe("llama-8b", "lora", "keep"),
    "8b-lora-keep-half": Recipe("llama-8b", "lora", "keep", supervised=0.5),
    "8b-lora-fp8": Recipe("llama-8b", "lora", "keep", "fp8"),
    "8b-lora-lean": Recipe("llama-8b", "lora", "lean"),
    "8b-lora-defaults": Recipe("llama-8b", "lora", "auto"),
    "8b-qlora-lean": Recipe("llama-8b", "qlora", "lean", "nf4"),
    "4b-lora-keep": Recipe("qwen3-4b", "lora", "keep"),
    "0.6b-lora": Recipe("qwen3-0.6b", "lora", "keep"),
    "0.6b-full": Recipe("qwen3-0.6b", "full", "keep"),
    "0.6b-qlora": Recipe("qwen3-0.6b", "qlora", "keep", "nf4"),
}
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN3 = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
QWEN3_06B = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
SHAPES = {
    "llama-8b": ("llama", LLAMA_8B),
    "qwen3-4b": ("qwen3", QWEN3 | QWEN3_4B),
    "qwen3-0.6b": ("qwen3", QWEN3 | QWEN3_06B),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_inputs(directory: Path, name: str) -> None:
    """A checkpoint with random weights, a small tokenizer and rows of tokens; nothing where they are already."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if (directory / name / "rows.jsonl").is_file():
        return
    model_type, sizes = SHAPES[name]
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 40960}
    config = AutoConfig.for_model(model_type, **sizes, **tokens)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory / name, max_shard_size="4GB")
    special = ["<|pad|>", "<|end|>", "<|begin|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1], bos_token=special[2]
    ).save_pretrained(directory / name)
    rng = random.Random(0)
    with open(directory / name / "rows.jsonl", "w", encoding="utf-8") as file:
        for _ in range(3000):
            length = int(min(LENGTH, max(32, rng.lognormvariate(math.log(350), 0.9))))
            row = [rng.randrange(10, config.vocab_size) for _ in range(length)]
            file.write(json.dumps({"input_ids": row}) + "\n")


def load(system: str, recipe: Recipe, path: str, length: int = LENGTH):
    """The system's model, tokenizer and adapter configuration, and its own `SFTConfig` options."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    keep, tokenizer = recipe.policy == "keep", AutoTokenizer.from_pretrained(path)
    settings = {"r": 16, "lora_alpha": 16, "target_modules": TARGETS}
    adapter = None if recipe.method == "full" else LoraConfig(**settings, lora_dropout=0.0, task_type="CAUSAL_LM")
    if system == "truetune":
        from truetune import load_model

        return load_model(path, precision=recipe.precision), tokenizer, adapter, {"activation_policy": recipe.policy}
    options: dict = {"gradient_checkpointing": not keep}
    if system == "unsloth":
        from unsloth import FastLanguageModel

        checkpointing = False if keep else "unsloth"
        model, tokenizer = FastLanguageModel.from_pretrained(
            path,
            max_seq_length=length,
            dtype=torch.bfloat16,
            load_in_4bit=recipe.method == "qlora",
            full_finetuning=recipe.method == "full",
            use_gradient_checkpointing=checkpointing,
        )
        if recipe.method != "full":
            model = FastLanguageModel.get_peft_model(
                model, **settings, lora_dropout=0, use_gradient_checkpointing=checkpointing
            )
        return model, tokenizer, None, options
    quantization = None
    if recipe.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.bfloat16,
        device_map={"": 0},
        quantization_config=quantization,
        attn_implementation="flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa",
    )
    return model, tokenizer, adapter, options | {"padding_free": True, "use_liger_kernel": system == "liger"}


def completion_mask(length: int, supervised: float) -> list[int]:
    prompt = round(length * (1 - supervised))
    return [0] * prompt + [1] * (length - prompt)


def step_settings(recipe: Recipe) -> dict:
    """What of `SFTConfig` is the same for all systems."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,  # named, because Unsloth's default is 2
        "learning_rate": 1e-5,
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "max_length": LENGTH,
        "packing": True,
        "completion_only_loss": True if recipe.supervised < 1 else None,
        "optim": "adamw_torch_fused",
        "seed": 0,
        "disable_tqdm": True,
    }


def train_one(system: str, recipe: Recipe, directory: Path) -> dict:
    """Trains in this process: tokens/s, ms a step, peak GiB, seconds until ready and of the first step, losses, and
    what truetune reports to be in effect."""
    begun = time.perf_counter()
    if system == "unsloth":
        import unsloth  # noqa: F401  # before everything that it patches
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback

    if system == "truetune":
        from truetune import SFTConfig, SFTTrainer
    else:
        from trl import SFTConfig, SFTTrainer
    path = str(directory / recipe.model)
    model, tokenizer, peft_config, options = load(system, recipe, path)
    args = SFTConfig(**step_settings(recipe), **options)
    stamps: list[float] = []
    in_graphs: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())
            print(f"step {state.global_step} at {stamps[-1] - begun:.1f} s", file=sys.stderr, flush=True)
            if state.global_step == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            if state.global_step == STEPS:
                in_graphs.append(graph_bytes())

    rows = load_dataset("json", data_files=f"{path}/rows.jsonl", split="train")
    if recipe.supervised < 1:
        rows = rows.map(lambda row: {"completion_mask": completion_mask(len(row["input_ids"]), recipe.supervised)})
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Clock()],
    )
    tokens: list[int] = []
    get_batch_samples = trainer.get_batch_samples

    def counted(*arguments):  # not in the collator, which is then no longer the system's own
        batches, num_items = get_batch_samples(*arguments)
        tokens.extend(batch["input_ids"].numel() for batch in batches)
        return batches, num_items

    trainer.get_batch_samples = counted
    if trainer.args.gradient_accumulation_steps != 1:
        raise RuntimeError(f"{system} accumulates gradients: a step is {ROWS} rows for everybody.")
    ready = time.perf_counter()
    trainer.train()
    steps_ms = [round(1e3 * (end - begin), 1) for begin, end in pairwise(stamps[WARM_UP - 1 :])]
    seconds = stamps[-1] - stamps[WARM_UP - 1]
    result = {
        "system": system,
        "tokens_per_s": round(sum(tokens[WARM_UP:STEPS]) / seconds),
        "ms_per_step": round(1e3 * seconds / (STEPS - WARM_UP), 1),
        "steps_ms": steps_ms,
        "peak_gib": round((torch.cuda.max_memory_allocated() + in_graphs[0]) / 2**30, 2),
        "ready_s": round(ready - begun, 1),
        "first_step_s": round(stamps[0] - ready, 1),
        "losses": [round(entry["loss"], 4) for entry in trainer.state.log_history if "loss" in entry],
    }
    if system == "truetune":
        lines = trainer.report.lines
        result["in_effect"] = {line.part: "; ".join(filter(None, (line.in_effect, line.why))) for line in lines}
    if system == "truetune" and os.environ.get("TRUETUNE_PROFILE"):
        result["profile"] = profile_step(trainer, os.environ["TRUETUNE_PROFILE"])
    return result


def graph_bytes() -> int:
    """What CUDA graphs hold of the device that is not allocated while they do not run, and no one else can have."""
    import torch

    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] - s["allocated_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def profile_step(trainer, path: str) -> str:
    """One more step, written to `path`: the kernels by their time on the device, and Python's functions by theirs."""
    import cProfile
    import io
    import pstats

    import torch

    batches = iter(trainer.get_train_dataloader())
    num_items = torch.tensor(16000, device="cuda")

    def step():
        batch = trainer._prepare_inputs(next(batches))
        trainer.training_step(trainer.model_wrapped, batch, num_items_in_batch=num_items)
        torch.cuda.synchronize()

    for _ in range(3):
        begun = time.perf_counter()
        step()
        wall_ms = 1e3 * (time.perf_counter() - begun)  # without a profiler, and without the trainer's loop around it
    with torch.profiler.profile() as profile:
        step()
    by_name: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            by_name.setdefault(event.name, []).append(event.device_time)
    lines = [f"{sum(t) / 1e3:9.2f} ms {len(t):5d} x  {name[:100]}" for name, t in by_name.items()]
    total = sum(sum(t) for t in by_name.values()) / 1e3
    lines.sort(key=lambda line: -float(line.split()[0]))
    text = "\n".join([f"{wall_ms:9.2f} ms a step", f"{total:9.2f} ms of kernels", *lines])
    python, table = cProfile.Profile(), io.StringIO()
    with torch.autograd.set_multithreading_enabled(False):  # the backward pass in this thread, where it is seen
        python.runcall(step)
    pstats.Stats(python, stream=table).strip_dirs().sort_stats("tottime").print_stats(45)
    Path(path).write_text(text + "\n\n" + table.getvalue())
    return path


def run_apart(system: str, name: str, directory: Path, peer_path: str, limit: float | None) -> dict | None:
    environment = dict(os.environ)
    if system != "truetune" and peer_path:
        environment["PYTHONPATH"] = f"{peer_path}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--one", system, name, "--inputs", str(directory)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        print(f"{system} {name} took more than {limit} s:\n{(expired.stderr or b'')[-2000:].decode()}", flush=True)
        return None
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        print(f"{system} {name} failed:\n{done.stderr[-3000:]}", flush=True)
        return None
    return json.loads(found[-1].removeprefix("RESULT "))


def table_rows(name: str, runs: list[dict]) -> str:
    """Of the table: every system's numbers with one recipe, and truetune's over them."""
    ours = next((run for run in runs if run["system"] == "truetune"), None)
    lines = [name]
    for run in runs:
        ratio = "" if ours is None or run is ours else (
            f"{'':12}{ours['tokens_per_s'] / run['tokens_per_s']:>7.2f}x{ours['peak_gib'] / run['peak_gib']:>7.2f}x"
        )  # fmt: skip
        lines.append(f"  {run['system']:16}{run['tokens_per_s']:>10,}{run['peak_gib']:>10.2f}{ratio}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="truetune,trl")
    parser.add_argument("--recipe", action="append", choices=RECIPES, default=[])
    parser.add_argument("--inputs", type=Path, default=Path("/dev/shm/truetune-inputs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--limit", type=float, help="seconds that one system may take with one recipe")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "RECIPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_inputs(options.inputs, options.make)
        return
    if options.one:
        system, name = options.one
        print("RESULT " + json.dumps(train_one(system, RECIPES[name], options.inputs)), flush=True)
        return
    systems = options.systems.split(",")
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--systems {', '.join(sorted(unknown))} is unknown: use some of {','.join(SYSTEMS)}.")
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/compare.py needs a CUDA GPU: its numbers mean nothing on a CPU.")
    results = []
    print(HEADER, flush=True)
    for name in options.recipe or ["0.6b-lora"]:
        # Apart: a process that has used the GPU holds memory that the systems may need.
        command = [sys.executable, __file__, "--make", RECIPES[name].model, "--inputs", str(options.inputs)]
        subprocess.run(command, check=True)
        runs = [run_apart(system, name, options.inputs, options.peer_path, options.limit) for system in systems]
        results.append({"recipe": name, **asdict(RECIPES[name]), "runs": [run for run in runs if run]})
        print(table_rows(name, results[-1]["runs"]), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({**environment(), "results": results}, indent=1) + "\n")


def environment() -> dict:
    import torch
    import transformers
    import trl

    return {
        "command": "python " + " ".join(sys.argv),
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
    }


if __name__ == "__main__":
    main()
