"""What the run will write is tried before it: the adapter or the model, its way back, and the disk it needs."""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from truetune.proof.result import Check

MOST_BYTES = 2**31  # of weights that are written for a try; more is a matter of minutes


def check_export(model: Any) -> Check:
    """Saves to a temporary directory and reads back: each tensor must be there, bit for bit."""
    name, limit = "export", "every tensor read back bit for bit"
    state = _state(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > MOST_BYTES:
        return Check(name, f"not tried: {size / 2**30:.1f} GiB to write", limit, "skip")
    adapter = model.active_adapters[0] if isinstance(model, PeftModel) else "default"
    config = vars(model.config)
    had = dict(config)
    with tempfile.TemporaryDirectory() as directory:
        try:
            model.save_pretrained(directory)
        finally:  # saving writes dtype and architectures into it
            config.clear()
            config.update(had)
        read: dict[str, Tensor] = {}
        # PEFT puts an adapter of another name into a directory of its own.
        for file in Path(directory, "" if adapter == "default" else adapter).glob("*.safetensors"):
            read |= load_file(file)
    wrong = [key for key, tensor in state.items() if key in read and not _same(read[key], tensor)]
    values = {_fingerprint(tensor) for tensor in read.values()}
    missing = [key for key, tensor in state.items() if key not in read and _fingerprint(tensor) not in values]
    # Transformers stacks a mixture's experts and saves them one by one: as many numbers, and the same. What else has
    # another name in files (Mixtral's routers) is none of them.
    held = {_fingerprint(tensor) for tensor in state.values()}
    others = [tensor for key, tensor in read.items() if key not in state and _fingerprint(tensor) not in held]
    if missing and _amount(others) == _amount([state[key] for key in missing]):
        missing = []
    bad = wrong + missing
    return Check(
        name,
        f"{len(read)} tensors, {size / 2**20:.1f} MiB" + (f"; lost or changed: {', '.join(bad[:3])}" if bad else ""),
        limit,
        "fail" if bad else "pass",
        mend="what is saved is not what is trained: report the model" if bad else "",
        allow="export" if bad else "",
        details={"bytes": size, "missing": missing, "changed": wrong},
    )


def check_disk(trainer: Any) -> Check:
    """Free disk against checkpoints and the result; an optimizer holds two fp32 averages at most."""
    args, trained = trainer.args, [p for p in trainer.model.parameters() if p.requires_grad]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in _state(trainer.model).values())
    optimizer = 0 if args.save_only_model else 8 * sum(parameter.numel() for parameter in trained)
    kept = _checkpoints(args)
    needed = weights + kept * (weights + optimizer)
    place = next(path for path in (Path(args.output_dir).absolute(), *Path(args.output_dir).absolute().parents)
                 if path.exists())  # fmt: skip
    free = shutil.disk_usage(place).free
    low = needed > free
    return Check(
        "disk",
        f"{free / 2**30:,.1f} GiB free",
        f"{needed / 2**30:,.2f} GiB for {kept} checkpoints and the result",
        "fail" if low else "pass",
        mend="the disk fills up during the run: lower save_total_limit or choose another output_dir" if low else "",
        allow="disk" if low else "",
        details={"free": free, "needed": needed},
    )


def _checkpoints(args: Any) -> int:
    """The most that lie on disk at once, as far as the settings tell: `save_total_limit`, or five, and one more while
    the oldest is still there; fewer where the run is too short for so many."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    kept = (args.save_total_limit or 5) + 1
    if strategy == "steps" and args.max_steps > 0 and args.save_steps >= 1:
        return min(kept, math.ceil(args.max_steps / args.save_steps))  # the last step saves too
    if strategy == "epoch" and args.max_steps <= 0:
        return min(kept, math.ceil(args.num_train_epochs))
    return kept


def _state(model: Any) -> dict[str, Tensor]:
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
        return {key: tensor for key, tensor in state.items() if ".base_layer." not in key}
    return model.state_dict()


def _same(read: Tensor, tensor: Tensor) -> bool:
    tensor = tensor.detach().cpu()
    return read.dtype == tensor.dtype and read.shape == tensor.shape and torch.equal(read, tensor)


def _fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Tied weights are written once, under one of their names."""
    flat = tensor.detach().flatten()[:64].cpu()
    return tuple(tensor.shape), tuple(flat.double().tolist())


def _amount(tensors: list[Tensor]) -> tuple[int, int]:
    """How many elements, and the sum of their bytes: the same for any order and cutting of them."""
    sums = (tensor.detach().cpu().contiguous().view(torch.uint8).sum(dtype=torch.int64) for tensor in tensors)
    return sum(tensor.numel() for tensor in tensors), sum(int(part) for part in sums)
