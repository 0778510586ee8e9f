"""Weights are read before what loads them is imported, and nothing goes wrong where they cannot be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models.small_models import make

from truetune import readahead
from truetune.readahead import read_ahead, weight_files

REPOSITORY = "some/model"
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """In several files, with weights beside them that Transformers does not load."""
    directory = tmp_path_factory.mktemp("checkpoint")
    make("llama").save_pretrained(directory, max_shard_size="50KB")
    (directory / "consolidated.safetensors").write_bytes(b"0" * 100_000)
    return directory


def bytes_read(model: str, **kwargs) -> int:
    """By system calls of this process, while `read_ahead` runs."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = so_far()
    thread = read_ahead(model, **kwargs)
    if thread is not None:
        thread.join()
    return so_far() - before


def test_all_that_will_be_loaded_is_read(checkpoint):
    files = weight_files(checkpoint)
    assert len(files) > 2
    assert {path.name for path in files} == {path.name for path in checkpoint.glob("model-*.safetensors")}
    size = sum(path.stat().st_size for path in files)
    assert size <= bytes_read(str(checkpoint)) < size + 50_000


def test_a_checkpoint_of_one_file(tmp_path):
    make("llama").save_pretrained(tmp_path)
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert bytes_read(str(tmp_path)) >= (tmp_path / "model.safetensors").stat().st_size


def test_a_whole_file_goes_before_an_index(checkpoint, tmp_path):
    make("llama").save_pretrained(tmp_path)
    for path in checkpoint.glob("model*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_name_in_the_hubs_cache(checkpoint, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoint)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    size = sum(path.stat().st_size for path in weight_files(checkpoint))
    assert bytes_read(REPOSITORY) >= size
    assert bytes_read(REPOSITORY, revision="other") < 50_000


def test_what_would_not_stay_in_memory_is_not_read(checkpoint, monkeypatch):
    size = sum(path.stat().st_size for path in weight_files(checkpoint))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # they share what one of them reads
    monkeypatch.setattr(readahead, "available_bytes", lambda: 2 * size)
    assert bytes_read(str(checkpoint)) >= size
    monkeypatch.setattr(readahead, "available_bytes", lambda: 2 * size - 2)
    assert bytes_read(str(checkpoint)) < 50_000


def test_one_process_of_a_machine_reads(checkpoint, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert read_ahead(str(checkpoint)) is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert bytes_read(str(checkpoint)) > 50_000


@pytest.mark.parametrize(
    "index",
    ["", "[]", "[" * 20_000, "{}", *(f'{{"weight_map": {names}}}' for names in ("[]", '{"a": 1}', '{"a": "none"}'))],
)
def test_a_damaged_index_is_left_to_the_loader(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert bytes_read(str(tmp_path)) < 50_000


def test_an_index_leads_nowhere_else(tmp_path):
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"0" * 100_000)
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    names = {"a": "../outside.safetensors", "b": str(outside)}
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert weight_files(inside) == []


@pytest.mark.parametrize("model", ["builtin:demo", "/nowhere", "none/such", "a b/c", "", "x" * 5000])
def test_no_checkpoint_is_left_to_the_loader(model):
    assert bytes_read(model) < 50_000


def test_reading_begins_before_the_imports():
    program = (
        "import sys; from truetune.recipe import load_recipe\n"
        "def named(model, revision): print(model, revision, 'torch' in sys.modules)\n"
        "load_recipe(None, ['revision=v1', 'training.max_steps=1'], {'model': '~/m', 'data': 'd.jsonl'}, named)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{Path.home()}/m v1 False", "True"]
