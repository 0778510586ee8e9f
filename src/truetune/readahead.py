"""A checkpoint's weights into the page cache, while Python imports what will load them.

Imports take ten seconds in which the disk has nothing to do, and 16 GB take a disk of 1.5 GB/s as long. The kernel does
not read whole files ahead when it is asked to (POSIX_FADV_WILLNEED), so they are read, and what was read is dropped.
"""

import json
import logging
import mmap
import os
from pathlib import Path
from threading import Thread

from truetune.host import available_bytes

logger = logging.getLogger(__name__)

BLOCK = 64 << 20  # bytes a read: after each the thread waits for the GIL, which importing gives up every 5 ms
SHARE = 0.5  # of the memory that is free, at most: what does not stay would be read twice


def read_ahead(model: str, revision: str = "main") -> Thread | None:
    """Begins to read the weights of `model`, a directory or a name in the Hub's cache.

    Returns the thread, which ends with the process, or None where another of this machine's processes reads them.
    Nothing is raised here: what is wrong with a checkpoint is said where it is loaded.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    thread = Thread(target=_read, args=(model, revision), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(model: str, revision: str) -> None:
    try:
        files = weight_files(_checkpoint(model, revision))
        if sum(path.stat().st_size for path in files) <= SHARE * available_bytes():
            buffer = memoryview(mmap.mmap(-1, BLOCK))
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass
    except Exception as error:
        logger.debug("The weights of %s are not read ahead: %r", model, error)


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that Transformers will load, in its order; other weights may lie beside them.

    Not of a `subfolder` or a `variant`, which are read when they are loaded.
    """
    whole, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [checkpoint / name for name in sorted(names) if name == Path(name).name and (checkpoint / name).is_file()]


def _checkpoint(model: str, revision: str) -> Path:
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(found, str):
        raise FileNotFoundError(model)
    return Path(found).parent
