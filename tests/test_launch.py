"""Several processes from one: who they are, what they say, and how they end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from truetune.launch import processes_to_start
from truetune.train.errors import TrainError

START = """
import os, signal, sys, time
rank = os.environ.get("RANK")
if rank is None:
    from truetune.launch import launch
    sys.exit(launch(2, on_gpus=False))
def say(text):
    open(os.path.join(sys.argv[1], f"rank{rank}"), "a").write(text)
"""


def start(tmp_path, body: str) -> subprocess.Popen:
    script = tmp_path / "script.py"
    script.write_text(START + body)
    command = [sys.executable, str(script), str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(tmp_path, process: subprocess.Popen) -> list[str]:
    """What each rank has said so far, once each has said something."""
    texts = [tmp_path / "rank0", tmp_path / "rank1"]
    while not all(text.is_file() and text.read_text() for text in texts):
        assert process.poll() is None
        time.sleep(0.01)
    return [text.read_text() for text in texts]


def test_each_process_knows_its_rank_and_the_first_speaks(tmp_path):
    body = 'say(os.environ["WORLD_SIZE"] + os.environ["LOCAL_RANK"] + os.environ["MASTER_PORT"]); print("from", rank)'
    process = start(tmp_path, body)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, "from 0\n", "")
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first[:2] == "20" and second[:2] == "21" and first[2:] == second[2:]


def test_a_rank_that_fails_is_heard_and_ends_the_others(tmp_path):
    begun = time.monotonic()
    process = start(tmp_path, 'sys.exit("out of memory") if rank == "1" else time.sleep(100)')
    out, err = process.communicate()
    assert (process.returncode, out, err) == (1, "", "out of memory\n")
    assert time.monotonic() - begun < 60


def test_a_mistake_that_all_ranks_find_is_said_once(tmp_path):
    process = start(tmp_path, 'time.sleep(0.2 * (rank == "0")); print("a mistake", file=sys.stderr); sys.exit(2)')
    _, err = process.communicate()
    assert (process.returncode, err) == (2, "a mistake\n")


def test_ctrl_c_reaches_each_rank_once_and_is_waited_for(tmp_path):
    body = """
def save(signum, frame):
    say("stopped ")
    time.sleep(0.5)
    say("saved")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
say("ready ")
time.sleep(100)
"""
    process = start(tmp_path, body)
    assert said(tmp_path, process) == ["ready "] * 2
    os.kill(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert said(tmp_path, process) == ["ready stopped saved"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_no_rank_outlives_a_killed_parent(tmp_path):
    process = start(tmp_path, "say(str(os.getpid())); time.sleep(100)")
    pids = said(tmp_path, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    commands = [Path(f"/proc/{pid}/cmdline") for pid in pids]
    while any(path.exists() and path.read_text() for path in commands):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_how_many_processes_are_started(monkeypatch):
    assert processes_to_start(None, num_gpus=0) is None
    assert processes_to_start(None, num_gpus=1) is None
    assert processes_to_start(None, num_gpus=4) == 4
    assert processes_to_start(2, num_gpus=0) == 2
    assert processes_to_start(1, num_gpus=4) == 1  # in a process of its own, so that it sees one GPU
    with pytest.raises(TrainError, match="give at most 4"):
        processes_to_start(8, num_gpus=4)
    with pytest.raises(TrainError, match="give 1 or more"):
        processes_to_start(0, num_gpus=4)
    monkeypatch.setenv("LOCAL_RANK", "1")  # another launcher has started us
    assert processes_to_start(None, num_gpus=4) is None
