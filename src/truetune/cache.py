"""Where things are kept that can be made again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Of this user, for all of truetune; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truetune"
