"""From the command to the end of the first step of an 8B LoRA run: truetune's command beside peers' scripts.

    python benchmarks/bench_startup.py --data gsm8k_train.jsonl --inputs DIR [--systems truetune,trl] [--out FILE]

The checkpoint (Llama 3.1 8B's shape, random weights) lies in `--inputs` on a local disk. Every system reads text,
renders, tokenizes and packs it to four rows of 4,096 a step, with its own defaults otherwise; truetune's preflight is
the quick one. Each run is a process of its own, with no prepared data left by another. Weights "in memory" are in the
operating system's page cache; "on disk" they were taken out of it, and the disk's rate was measured. Round 0 compiles
Python files and kernels, and does not count.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import compare
from bench_gsm8k import build_tokenizer

MODEL = "llama-8b"
BLOCK = 64 << 20  # bytes


def make_inputs(directory: Path, data: Path) -> None:
    """The checkpoint with a tokenizer for `data`; nothing where it is already."""
    if not (directory / MODEL / "rows.jsonl").is_file():
        command = [sys.executable, compare.__file__, "--make", MODEL, "--inputs", str(directory)]
        subprocess.run(command, check=True)  # apart: a process that has used the GPU holds memory
        build_tokenizer(directory / MODEL, data)


def weights(directory: Path) -> list[Path]:
    return sorted((directory / MODEL).glob("*.safetensors"))


def forget(files: list[Path]) -> None:
    """Takes the files out of the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(path: Path) -> float:
    """GB/s of one thread that reads the file."""
    buffer, begun = memoryview(mmap.mmap(-1, BLOCK)), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return path.stat().st_size / (time.perf_counter() - begun) / 1e9


def command(system: str, options: argparse.Namespace, data: Path, output: Path) -> list[str]:
    if system != "truetune":
        return [sys.executable, __file__, "--one", system, "--data", str(data), "--inputs", str(options.inputs)]
    recipe = data.with_suffix(".yaml")
    columns = {"prompt": "question", "completion": "answer"}
    recipe.write_text(json.dumps({"data": [{"path": str(data), "columns": columns}]}))  # JSON is YAML
    return [
        sys.executable, "-m", "truetune", "train", str(recipe), "--model", str(options.inputs / MODEL),
        "--output", str(output), f"max_length={compare.LENGTH}", "preflight=quick", "training.max_steps=1",
        f"training.per_device_train_batch_size={compare.ROWS}", "training.gradient_accumulation_steps=1",
        "training.save_strategy=no",
    ]  # fmt: skip


def script(system: str, options: argparse.Namespace) -> None:
    """What a user of TRL or Unsloth writes."""
    if system == "unsloth":
        import unsloth  # noqa: F401  # before everything that it patches
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    recipe = compare.RECIPES["8b-lora-defaults"]
    model, tokenizer, adapter, own = compare.load(system, recipe, str(options.inputs / MODEL))
    rows = load_dataset("json", data_files=str(options.data), split="train")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**compare.step_settings(recipe), "max_steps": 1}, **own),
        train_dataset=rows.rename_columns({"question": "prompt", "answer": "completion"}),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()  # logs the loss of its step, which waits for the device


def seconds_to_first_step(system: str, options: argparse.Namespace, number: int) -> float:
    """From the start of the process to the line with the first step's loss. `number`: of the run."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # to compile every import anew takes longer than all else
    if system != "truetune" and options.peer_path:
        environment["PYTHONPATH"] = f"{options.peer_path}:{environment.get('PYTHONPATH', '')}"
    first_loss = "step 1/1  loss" if system == "truetune" else "'loss':"
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory, "data.jsonl")
        rows = options.data.read_text(encoding="utf-8").splitlines(keepends=True)
        data.write_text("".join(rows[number:] + rows[:number]), encoding="utf-8")  # nobody has prepared it before
        begun, seconds, log = time.perf_counter(), None, []
        process = subprocess.Popen(
            command(system, options, data, Path(directory, "run")),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if seconds is None and first_loss in line:
                seconds = time.perf_counter() - begun
        if process.wait() or seconds is None:
            sys.exit(f"{system} failed:\n{''.join(log)[-3000:]}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--systems", default="truetune,trl")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        script(options.one, options)
        return
    make_inputs(options.inputs, options.data)
    plan = [(0, "memory")] + [(n + 1, state) for n in range(options.rounds) for state in ("memory", "disk")]
    runs: list[dict] = []
    for number, state in plan:
        for system in options.systems.split(",")[:: -1 if number % 2 else 1]:  # by turns
            run = {"system": system, "round": number, "weights_in": state}
            if state == "disk":
                forget(weights(options.inputs))
                run["disk_gb_per_s"] = round(read_rate(weights(options.inputs)[0]), 2)
                forget(weights(options.inputs))
            run["seconds"] = round(seconds_to_first_step(system, options, len(runs)), 1)
            print("  ".join(f"{name} {value}" for name, value in run.items()), flush=True)
            runs.append(run)
            if options.out:
                options.out.write_text(json.dumps({**compare.environment(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
