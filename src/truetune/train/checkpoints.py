"""Whether a checkpoint is whole: each carries a list of its files, and its trainer_state.json is written last."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from truetune.train.errors import TrainError

FILES = "files.json"
STATE = "trainer_state.json"


def list_files(checkpoint: Path) -> None:
    """Writes the sizes of all files that are there beside them. Call before trainer_state.json is written."""
    paths = (path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in sorted(paths)}
    beside = checkpoint / f".{FILES}.new"
    beside.write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, checkpoint / FILES)


def forget_files(path: Path, step: int) -> None:
    (path / f"{PREFIX_CHECKPOINT_DIR}-{step}" / FILES).unlink(missing_ok=True)


def why_cut_short(checkpoint: Path) -> str | None:
    """What a checkpoint lacks: it was being written, or taken away, when its run was killed. None: it is whole.

    A checkpoint that stock TRL wrote has no list of files, and so is never whole.
    """
    sizes = _read(checkpoint / FILES)
    if sizes is None:
        return f"its {FILES} is missing"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size:
            return f"its {name} is {'not whole' if path.is_file() else 'missing'}"
    return None if "global_step" in (_read(checkpoint / STATE) or {}) else f"its {STATE} is not whole"


def refuse_cut_short(checkpoint: Path) -> None:
    """Raises `TrainError` for a checkpoint of ours that is not whole; one without a list may be stock TRL's."""
    why = why_cut_short(checkpoint) if (checkpoint / FILES).exists() else None
    if why is not None:
        raise TrainError(f"{checkpoint} was cut short ({why}): go on from an earlier checkpoint.")


def load_other_names(model: Any, checkpoint: Path) -> None:
    """Loads what `load_state_dict` cannot find: a mixture's experts, which Transformers stacks and saves one by one.

    Transformers' own way back from a checkpoint (5.17 to 5.23) warns of them and goes on with what they were before.
    """
    names: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    missing = [name for name, _ in model.named_parameters() if name not in names]
    if not names or not missing:
        return
    state = type(model).from_pretrained(checkpoint, dtype="auto").state_dict()
    model.load_state_dict({name: state[name] for name in missing if name in state}, strict=False)


def checkpoint_step(checkpoint: Path) -> int | None:
    """The step after which a checkpoint was taken; None where it is not whole."""
    if why_cut_short(checkpoint) is not None:
        return None
    return int((_read(checkpoint / STATE) or {})["global_step"])


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints below `path`, whole or not."""
    return [place for place in path.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if place.is_dir()]


def last_checkpoint(path: Path) -> Path | None:
    """The newest whole checkpoint."""
    whole = {step: place for place in checkpoints(path) if (step := checkpoint_step(place)) is not None}
    return whole[max(whole)] if whole else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
