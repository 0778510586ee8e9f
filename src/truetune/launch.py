"""One process a GPU: starts them, passes signals on, and answers with one exit code.

The processes find each other through the environment variables of torchrun, from which Accelerate makes the process
group. Accelerate's own launcher is not used, for three reasons: on Ctrl-C it sends a second SIGINT and kills what has
not ended after 30 s, which is too short to save a large model; it shows a user's mistake as a traceback of its own;
and on a CPU it starts one process.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from truetune.train.errors import TrainError

MISTAKE = 2  # the exit code of a user's mistake, which every rank finds
INTERRUPTED = 130  # the shell's code for SIGINT
GRACE = 5.0  # seconds for the other ranks to end once one has failed
PR_SET_PDEATHSIG = 1  # of prctl(2)
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def processes_to_start(asked: int | None, num_gpus: int) -> int | None:
    """How many processes to start, by default one a GPU; None: none, this one does the work.

    That is so under another launcher, too. Raises `TrainError` for more processes than GPUs.
    """
    if "LOCAL_RANK" in os.environ:
        return None
    count = max(num_gpus, 1) if asked is None else asked
    if count < 1:
        raise TrainError(f"--num-processes {count} cannot be: give 1 or more.")
    if 0 < num_gpus < count:
        raise TrainError(f"--num-processes {count} is more than the GPUs here: give at most {num_gpus}.")
    return None if count == 1 and num_gpus < 2 else count


def launch(num_processes: int, *, on_gpus: bool) -> int:
    """Runs this program again in `num_processes` processes, each with its rank in the environment; the exit code.

    Rank 0 has this process's terminal; what another rank says on stderr is shown if it is the first to fail. A rank
    that fails ends the others. Signals are passed on as they come, so that the first Ctrl-C saves a checkpoint.
    """
    shared = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "ACCELERATE_USE_CPU": str(not on_gpus),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes))),
    }
    command = [sys.executable, *sys.orig_argv[1:]]
    processes: list[subprocess.Popen] = []

    def pass_on(signum, frame) -> None:
        for process in processes:
            process.send_signal(signum)

    handlers = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    with contextlib.ExitStack() as logs:
        errors = [logs.enter_context(tempfile.TemporaryFile()) for _ in range(1, num_processes)]
        try:
            for rank in range(num_processes):
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                outputs: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": errors[rank - 1]} if rank else {}
                # In a process group of its own, a rank gets the terminal's Ctrl-C once: from here.
                started = subprocess.Popen(
                    command, env=environment, process_group=0, preexec_fn=_end_with_parent, **outputs
                )
                processes.append(started)
            failed = _wait(processes)
        finally:
            for process in processes:
                process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if failed and (processes[0].returncode, processes[failed].returncode) != (MISTAKE, MISTAKE):
            errors[failed - 1].seek(0)
            sys.stderr.write(errors[failed - 1].read().decode(errors="replace"))
    code = processes[failed or 0].returncode
    return code if code >= 0 else 128 - code  # as a shell says that a signal ended it


def _end_with_parent() -> None:
    """So that ranks do not go on, and hold their GPUs, after a `kill -9` of the process that started them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits for all; returns the first rank that failed, after which the others get `GRACE` seconds to end."""
    failed = None
    deadline = float("inf")
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            failed = next((rank for rank, code in enumerate(codes) if code not in (None, 0, INTERRUPTED)), None)
            deadline = deadline if failed is None else time.monotonic() + GRACE
        if None not in codes:
            return failed
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
