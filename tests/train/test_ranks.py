"""Ranks whose devices, hosts and measurements differ plan alike, by the worst of them: two processes, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train import agreeing_ranks as ranks
from truetune.models.plan import GIB

TESTS = Path(__file__).resolve().parents[1]
START = """
import os, sys
from truetune.launch import launch
if "RANK" not in os.environ:
    sys.exit(launch(2, on_gpus=False))
from train.agreeing_ranks import main
main()
"""


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory) -> list[dict]:
    """What each rank wrote."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-c", START, str(tiny_model), str(out)]
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", ranks.MEASURED)
def test_what_a_rehearsal_found_is_the_worst_of_all_ranks(found, case):
    """The most of what was there before, of what the rehearsal added to it, and of a layer's seconds."""
    first, second = (rank["agreed"][case] for rank in found)
    assert first == second
    expected = {
        "another rank's peak": [40 + 80, 40, 0.3],  # 80 is what the rank with the lower peak added
        "the same": [70, 50, 0.2],
        "one ran out": [None, 40, 0.1],
        "both ran out": [None, 40, None],
        "without a clock": [40 + 80, 40, None],
    }
    assert first == expected[case]


def test_the_room_is_that_of_the_fullest_device(found):
    first, second = found
    assert first["room"] == second["room"] == [53 * GIB, 80 * GIB]  # free, and what the allocator holds already
    assert first["weights"] == second["weights"] == max(ranks.ALLOCATED)


def test_copies_are_planned_for_the_slowest_and_smallest_host(found):
    first, second = found
    assert first["rates"] == second["rates"]
    assert first["rates"][-2:] == [min(ranks.HOST_RATE), min(ranks.HOST_BYTES)]


def test_ranks_that_measure_different_needs_try_and_settle_on_the_same_plans(found):
    """Alone, the first rank would have kept everything, which the second has no memory for."""
    first, second = (rank["rehearsed"] for rank in found)
    assert first == second
    assert len(first["tried"]) > 1
    assert first["tried"][0] == ["keep"] * ranks.LAYERS != first["choices"]
    assert first["peak"] is not None
    assert first["forward"] == 1.0 + max(ranks.NEEDED)


def test_an_evaluation_that_does_not_fit_on_one_rank_ends_all_with_one_sentence(found):
    first, second = (rank["evaluated"] for rank in found)
    assert first == second
    assert first[0] == ""
    assert "lower per_device_eval_batch_size from 4" in first[1]
