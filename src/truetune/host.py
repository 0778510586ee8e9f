"""How much memory the host has for this process."""

import os
from pathlib import Path


def host_bytes() -> int:
    """One process's share of `available_bytes`, of the processes of `LOCAL_WORLD_SIZE`."""
    return available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def available_bytes() -> int:
    """This machine's available memory, or what its container is allowed."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(available, left_of_container()))


def left_of_container(root: Path = Path("/sys/fs/cgroup")) -> int | float:
    """Of a control group's limit, where /proc/meminfo still shows the machine; files in its cache are given back."""
    for limit, used, cache in (("memory.max", "memory.current", "file"),
                               ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "cache")):  # fmt: skip
        try:
            statistics = (root / limit).with_name("memory.stat").read_text(encoding="ascii").split()
            files = int(statistics[statistics.index(cache) + 1])
            most = (root / limit).read_text(encoding="ascii").strip()
            return float("inf") if most == "max" else max(0, int(most) - int((root / used).read_text()) + files)
        except (OSError, ValueError):  # no control group of this version
            continue
    return float("inf")
