"""How long the full preflight takes on an 8B model, and what of it each check.

    python benchmarks/bench_check.py --data gsm8k_train.jsonl [--model llama-8b] [--out FILE]

The model has random weights and a tokenizer of bytes (`compare.py`), so that a row of GSM8K is about 500 tokens. Twice
`truetune check` with LoRA: the second has the kernels that the first compiled.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import SHAPES, environment, make_inputs


def check(model: Path, data: Path) -> dict:
    """Wall seconds of the command, and what its proof.json says of them."""
    recipe = {
        "model": str(model),
        "method": "lora",
        "chat_template": "chatml",
        "data": [{"path": str(data.resolve()), "columns": {"user": "question", "assistant": "answer"}}],
        "max_length": 4096,
        "training": {"per_device_train_batch_size": 4},
        "output_dir": tempfile.mkdtemp(),
    }
    path = Path(tempfile.mkdtemp()) / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "truetune", "check", str(path), "--json"], capture_output=True, text=True
    )
    wall = time.perf_counter() - begun
    if not done.stdout.strip():
        sys.exit(done.stderr[-3000:])
    proof = json.loads(done.stdout)
    verdicts = {found["name"]: found["verdict"] for found in proof["checks"] if found["verdict"] != "pass"}
    return {
        "wall_s": round(wall, 1),
        "preflight_s": round(proof["seconds"], 1),
        "durations_s": proof["durations"],
        "other_verdicts": verdicts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=SHAPES, default="llama-8b")
    parser.add_argument("--inputs", type=Path, default=Path("/dev/shm/truetune-inputs"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_inputs(options.inputs, options.model)
        return
    # Apart, because this process would hold device memory.
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    runs = [check(options.inputs / options.model, options.data) for _ in range(2)]
    for run in runs:
        print(f"{run['preflight_s']:.1f} s of preflight in {run['wall_s']:.1f}; not passed: {run['other_verdicts']}")
        for name, seconds in sorted(run["durations_s"].items(), key=lambda item: -item[1])[:12]:
            print(f"  {seconds:7.2f} s  {name}")
    if options.out:
        options.out.write_text(json.dumps({**environment(), "model": options.model, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
