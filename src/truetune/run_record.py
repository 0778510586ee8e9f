"""What a run leaves beside its weights: run.json and metrics.jsonl, as described in docs/output.md."""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from truetune.data.packing import PackSampler
from truetune.data.prepare import Counts, Prepared
from truetune.data.stream import DocumentStream
from truetune.recipe import Recipe
from truetune.run_model import model_path
from truetune.train.config import SFTConfig
from truetune.train.recipe_trainer import RecipeTrainer

_VERSIONS = ("truetune", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "triton")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf")
_BLOCK = 1 << 20
_BLOCKS_A_FILE = 64
WEIGHTS_HASH_METHOD = (
    "sha256 of each weight file in order of name: its name, its size, and all of it up to 64 MiB, "
    "else 64 blocks of 1 MiB spread evenly, the first and the last included"
)


def new_record(
    recipe: Recipe,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    plan: Mapping[str, Any],
    data: Prepared | DocumentStream,
    eval_data: Prepared | None,
) -> dict[str, Any]:
    """run.json as far as it is known before the weights are loaded."""
    data_hash = packs = None
    if isinstance(data, Prepared):
        data_hash = documents_hash(data.documents)
        seed = args.seed if args.data_seed is None else args.data_seed
        packs = PackSampler(data.lengths, recipe.max_length, seed) if recipe.packing else None
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "status": "running",
        "command": sys.orig_argv,
        "started": _now(),
        "resumed_from": [],
        "finished": None,
        "seed": args.seed,
        "processes": args.world_size,
        "recipe": recipe.to_dict(),
        "plan": dict(plan),
        "shapes": data.shapes,
        "data": data.counts.to_dict(),
        "eval_data": eval_data and eval_data.counts.to_dict(),
        "hashes": {
            "data": data_hash,
            "eval_data": eval_data and documents_hash(eval_data.documents),
            "pack_order": packs and packs_hash(packs),
            "chat_template": hashlib.sha256(template.encode()).hexdigest(),
        },
        "environment": environment(),
        "result": None,
    }


def with_model(record: Mapping[str, Any], recipe: Recipe, trainer: RecipeTrainer) -> dict[str, Any]:
    """`record` and what is known once the weights are loaded: what they are, and what of them is trained."""
    adapter = recipe.adapter if recipe.adapter is not None and os.path.isdir(recipe.adapter) else None
    hashes = {
        "weights": weights_hash(_checkpoint_directory(recipe)),
        "weights_method": WEIGHTS_HASH_METHOD,
        "adapter": adapter and weights_hash(Path(adapter)),
    }
    attention = next((line.in_effect for line in trainer.report.lines if line.part == "attention"), None)
    return {
        **record,
        "hashes": {**hashes, **record["hashes"]},
        "trainable": trainable_tensors(trainer.model),
        "attention_backend": attention,
        "report": None,
    }


def trainable_tensors(model: torch.nn.Module) -> dict[str, str]:
    """What is trained, the layers' numbers left out: {"layers.*.mlp.up_proj.weight": "28 of float32 [3072, 1024]"}."""
    found: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dtype = str(parameter.dtype).removeprefix("torch.")
            pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
            found.setdefault(pattern, Counter())[f"{dtype} {list(parameter.shape)}"] += 1
    return {
        pattern: ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
        for pattern, kinds in found.items()
    }


def read_record(output: Path) -> dict[str, Any] | None:
    """An earlier run's run.json; None where there is none that can be read."""
    try:
        return json.loads((output / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished(
    record: dict[str, Any],
    trainer: RecipeTrainer,
    counts: Counts,
    train_metrics: Mapping[str, float],
    last: Mapping[str, Mapping[str, Any]],
    interrupted: bool,
) -> dict[str, Any]:
    """run.json at the end: what the steps came to, and what the report and a stream counted while they ran."""
    result = {
        "steps": trainer.state.global_step,
        "train_loss": train_metrics.get("train_loss"),
        "eval_loss": last.get("eval", {}).get("eval_loss"),
        "train_seconds": train_metrics.get("train_runtime"),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
    }
    status = "interrupted" if interrupted else "finished"
    counted = {"data": counts.to_dict(), "report": trainer.report.to_dict()}
    return {**record, "status": status, "finished": _now(), **counted, "result": result}


def write_json(path: Path, value: Any) -> None:
    """Writes beside and renames into place. What JSON has no number for, such as a loss of NaN, becomes null."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(_finite(value), indent=2, allow_nan=False, default=str) + "\n", encoding="utf-8")
    os.replace(beside, path)


def as_written(value: Any) -> Any:
    """`value` as `write_json` and a reader make it."""
    return json.loads(json.dumps(_finite(value), default=str))


class MetricsFile:
    """metrics.jsonl: one JSON object a line, written out as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines_up_to(self, step: int) -> list[dict[str, Any]]:
        """The lines of a run up to the checkpoint that it goes on from."""
        text = self.path.read_text(encoding="utf-8") if step and self.path.is_file() else ""
        return [line for line in map(_parsed, text.splitlines()) if 0 <= line.get("step", -1) <= step]

    def begin(self, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Starts the file with `lines` alone, so that each step stands there once."""
        beside = self.path.with_name(f".{self.path.name}.new")
        beside.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
        os.replace(beside, self.path)

    def append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the line that a kill cut short
        return {}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Versions, every installed package (as `pip freeze` would list it), Python, platform, devices and driver."""
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {name: installed.get(name) for name in _VERSIONS} | {"cuda": torch.version.cuda},
        "pip_freeze": sorted(f"{name}=={version}" for name, version in installed.items()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices or [f"cpu ({os.cpu_count()} cores)"],
        "driver": _driver() if devices else None,
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):  # ROCm, or a container without the tool
        return None


def weights_hash(checkpoint: Path) -> str:
    """A checkpoint's weight files in one hash; `WEIGHTS_HASH_METHOD` says how.

    Reading all of a model of 16 GB takes a minute; 64 MiB a file take none, and no two trainings leave them equal.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in _WEIGHT_SUFFIXES):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= _BLOCK * _BLOCKS_A_FILE:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS_A_FILE):
                file.seek((size - _BLOCK) * block // (_BLOCKS_A_FILE - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def documents_hash(documents: datasets.Dataset) -> str:
    """sha256 of all lengths, token ids and labels, in order."""
    digest = hashlib.sha256()
    columns = documents.data.table
    for chunk in columns["input_ids"].chunks:
        digest.update(chunk.value_lengths().to_numpy())
    for name in ("input_ids", "labels"):
        for chunk in columns[name].chunks:
            digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()


def packs_hash(packs: Iterable[Sequence[int]]) -> str:
    """sha256 of the packs in the order in which they are trained, each a list of document numbers."""
    digest = hashlib.sha256()
    for pack in packs:
        digest.update(",".join(map(str, pack)).encode() + b"\n")
    return digest.hexdigest()


def _checkpoint_directory(recipe: Recipe) -> Path:
    path = model_path(recipe)
    return Path(
        path if os.path.isdir(path) else snapshot_download(path, revision=recipe.revision, local_files_only=True)
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
