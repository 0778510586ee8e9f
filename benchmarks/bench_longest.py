"""The longest single document that one training step takes, beside Unsloth: 8B, QLoRA r16, least memory.

    python benchmarks/bench_longest.py --systems truetune,unsloth --out FILE [--limit S] [--gib 24] [--first TOKENS]

A system's peak memory at 16,384 and 32,768 tokens gives a line, and the line the length at which the device would be
full. That length is tried, then shorter ones in steps of an eighth until a step goes through, or longer ones until one
does not: a plan may save less of each token where memory is short. What ran is the result, the line stands beside it.
`--first`, known from an earlier run, is where the search begins without a line.
A step's time grows with the square of its document. `--gib` gives either system a part of the device
(`set_per_process_memory_fraction`); `--only` tries one length alone, and `--steps 1` takes a single step, without
truetune's rehearsal, which would be another. Every length runs in a process of its own, on the inputs of `compare.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import RECIPES, environment, load

RECIPE = "8b-qlora-lean"
MEASURED = (16384, 32768)
SPARE = 0.97  # of the device's memory: what the CUDA context and other libraries take


def train_one(system: str, directory: Path, length: int, gib: float | None, steps: int) -> dict:
    """`steps` on documents of `length` tokens in this process: peak GiB, seconds of the last step, the plan."""
    if system == "unsloth":
        import unsloth  # noqa: F401  # before everything that it patches
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    if system == "truetune":
        from truetune import SFTConfig, SFTTrainer
    else:
        from trl import SFTConfig, SFTTrainer
    recipe = RECIPES[RECIPE]
    alone: dict = {"rehearse": False, "preflight": "off"} if system == "truetune" and steps == 1 else {}
    _, total = torch.cuda.mem_get_info()
    if gib:
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)
        total = gib * 2**30
    model, tokenizer, peft_config, options = load(system, recipe, str(directory / recipe.model), length)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, model.config.vocab_size, (length,), generator=generator).tolist() for _ in range(steps)]
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=1,
        learning_rate=1e-5, bf16=True,
        logging_steps=1, save_strategy="no", report_to=[], max_length=length, optim="adamw_torch_fused", seed=0,
        disable_tqdm=True, **options, **alone,
    )  # fmt: skip
    stamps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Clock()],
    )
    trainer.train()
    return {
        "length": length,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "device_gib": round(total / 2**30, 3),
        "seconds": round(stamps[-1] - stamps[-2], 2),
        "plan": trainer.activations.in_words if system == "truetune" else None,
    }


def run_apart(system: str, length: int, options: argparse.Namespace) -> dict:
    """What `train_one` found, or `why` it found nothing."""
    variables = dict(os.environ)
    if system != "truetune" and options.peer_path:
        variables["PYTHONPATH"] = f"{options.peer_path}:{variables.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--one", system, str(length), "--inputs", str(options.inputs)]
    command += ["--steps", str(options.steps)]
    if options.gib:
        command += ["--gib", str(options.gib)]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=options.limit)
    except subprocess.TimeoutExpired:
        return _said(system, {"length": length, "why": f"more than {options.limit:g} s"})
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
        why = "killed, for the host's memory perhaps" if done.returncode == -9 else last[0][:300]
        return _said(system, {"length": length, "why": why})
    return _said(system, json.loads(found[-1].removeprefix("RESULT ")))


def _said(system: str, run: dict) -> dict:
    came_to = run.get("why") or f"{run['peak_gib']:.2f} GiB, {run['seconds']:.1f} s"
    print(f"{system} {run['length']:,} tokens: {came_to}", flush=True)
    return run


def longest(system: str, options: argparse.Namespace) -> dict:
    if options.only:
        run = run_apart(system, options.only, options)
        return {"system": system, "longest": None if "why" in run else options.only, "runs": [run]}
    if options.first:
        return {"system": system, **_search(system, options.first, [], options)}
    runs = [run_apart(system, length, options) for length in MEASURED]
    if any("why" in run for run in runs):
        return {"system": system, "runs": runs, "longest": None}
    short, long = runs
    a_token = (long["peak_gib"] - short["peak_gib"]) / (long["length"] - short["length"])
    full = short["length"] + (SPARE * short["device_gib"] - short["peak_gib"]) / a_token
    found = _search(system, int(full) // 1024 * 1024, runs, options)
    return {"system": system, "by_the_line": int(full), "kib_a_token": round(a_token * 2**20, 2), **found}


def _search(system: str, length: int, runs: list[dict], options: argparse.Namespace) -> dict:
    """From `length` up or down in steps of an eighth; `runs` went through before."""
    reached, failed = max((run["length"] for run in runs), default=0), []
    while length > reached:
        run = run_apart(system, length, options)
        found = "why" not in run
        if found:
            runs.append(run)
            reached = length
        else:
            failed.append(run)
        if found and failed:
            break
        length = length * (9 if found else 7) // 8 // 1024 * 1024
    return {"longest": reached or None, "failed": failed, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default="truetune,unsloth")
    parser.add_argument("--inputs", type=Path, default=Path("/dev/shm/truetune-inputs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer-path", default="")
    parser.add_argument("--limit", type=float, help="seconds that one length may take")
    parser.add_argument("--gib", type=float, help="of the device's memory, that either system may use")
    parser.add_argument("--first", type=int, help="tokens of the first document tried")
    parser.add_argument("--only", type=int, help="tokens of the one document tried")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("SYSTEM", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        system, length = options.one
        result = train_one(system, options.inputs, int(length), options.gib, options.steps)
        print("RESULT " + json.dumps(result), flush=True)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/bench_longest.py needs a CUDA GPU: it looks for the end of one's memory.")
    maker = [sys.executable, str(Path(__file__).with_name("compare.py")), "--make", RECIPES[RECIPE].model]
    subprocess.run([*maker, "--inputs", str(options.inputs)], check=True)
    results = []
    for system in options.systems.split(","):
        results.append(longest(system, options))
        if options.out:
            options.out.write_text(json.dumps({**environment(), "results": results}, indent=1) + "\n")
    for result in results:
        print(f"{result['system']:12}{result['longest'] or 0:>12,} tokens")


if __name__ == "__main__":
    main()
