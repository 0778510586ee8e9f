"""Throughput and memory against the run's own past: slower steps, and memory that climbs and never stops.

Fed where the trainer logs, when the device has been waited for anyway; nothing here asks it for anything.
"""

import multiprocessing
import statistics
from collections import deque
from itertools import pairwise
from pathlib import Path

import torch

GIB = 2**30

# Throughput: intervals between logs without an evaluation, a checkpoint or an epoch's end inside.
LEAST_SECONDS = 4.0  # of an interval: shorter ones are taken together
WARM_UP = 3  # first intervals that do not count: compilation, caches, the loader's start
SAMPLE = 16  # intervals, at least, of what was usual at first, and of what is now: a minute of other work is no drift
MOST_USUAL = 512  # intervals
SLOW, RECOVERED = 0.6, 0.9  # of the usual rate
ALIKE = 0.25  # tokens a step may differ so much between the two: other batches have another rate

# Memory at the logs, where no activations are alive.
SETTLED = 8  # first logs that do not count: optimizer state, buffers, the allocator's pools
CLIMB = 32  # logs of a climb, in each quarter of which an eighth of it is gained: neither a jump nor one that stops
LEAK = 128 * 2**20  # bytes that it comes to, at least


class Throughput:
    """Tokens a second: the median of now against that of the run's beginning, so that a slow decline is one too."""

    def __init__(self, least_seconds: float = LEAST_SECONDS) -> None:
        self.least_seconds = least_seconds
        self.begun = (0.0, 0, 0.0)  # tokens, steps and seconds of an interval that is too short yet
        self.skipped = 0
        self.usual: list[tuple[float, float]] = []  # tokens a second, tokens a step
        self.recent: deque[tuple[float, float]] = deque()
        self.slow = False

    def see(self, tokens: float, steps: int, seconds: float) -> str | None:
        """An interval; what to say where the run has become slow, once until it has recovered."""
        tokens, steps, seconds = tokens + self.begun[0], steps + self.begun[1], seconds + self.begun[2]
        if seconds < self.least_seconds or tokens <= 0 or steps <= 0:
            self.begun = tokens, steps, seconds
            return None
        self.begun = (0.0, 0, 0.0)
        if self.skipped < WARM_UP:
            self.skipped += 1
            return None
        self.recent.append((tokens / seconds, tokens / steps))
        if len(self.recent) > SAMPLE:
            oldest = self.recent.popleft()
            if len(self.usual) < MOST_USUAL:
                self.usual.append(oldest)
        return self._compared() if len(self.usual) >= SAMPLE else None

    def _compared(self) -> str | None:
        usual, usual_step = map(statistics.median, zip(*self.usual, strict=True))
        now, step = map(statistics.median, zip(*self.recent, strict=True))
        if self.slow or now >= SLOW * usual or abs(step - usual_step) > ALIKE * usual_step:
            self.slow = self.slow and now < RECOVERED * usual
            return None
        self.slow = True
        return (
            f"{now:,.0f} tokens/s, where {usual:,.0f} were usual, with steps of like size: look what else runs on this "
            "machine, how warm its devices are, and whether the data is read fast enough"
        )


class Climb:
    """One kind of memory. `name`: of what, in the sentence."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = 0
        self.bytes: deque[int] = deque(maxlen=CLIMB + 1)
        self.told = False

    def see(self, now: int | None) -> str | None:
        """Bytes in use at a log; what to say where they have only climbed for long, once a run."""
        self.seen += 1
        if now is None or self.seen <= SETTLED or self.told:
            return None
        self.bytes.append(now)
        quarters = list(self.bytes)[:: CLIMB // 4]
        climbed = self.bytes[-1] - self.bytes[0]
        if len(self.bytes) <= CLIMB or climbed < LEAK:
            return None
        if any(after - before < climbed / 8 for before, after in pairwise(quarters)):
            return None
        self.told = True
        return (
            f"{self.name} grew from {self.bytes[0] / GIB:.2f} to {now / GIB:.2f} GiB in {CLIMB} logs without a stop: "
            "something keeps what each step makes, such as a callback or a metric that holds tensors (keep numbers)"
        )


def device_bytes(device: torch.device) -> int | None:
    """Bytes of live tensors on a GPU; None without one. The allocator's reserve grows with every new shape, and says
    nothing of leaks."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def process_bytes() -> int | None:
    """Bytes of this process and of its data loaders' workers that are their own: files mapped into them, such as the
    data, are not counted; what a worker shares since its fork is counted in each. Linux alone."""
    own = _anonymous_bytes("self")
    if own is None:
        return None
    return own + sum(_anonymous_bytes(worker.pid) or 0 for worker in multiprocessing.active_children())


def _anonymous_bytes(process: int | str | None) -> int | None:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # no Linux, or a worker that is gone
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("RssAnon:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024
