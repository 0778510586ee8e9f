"""A run trusts nobody: it tells no one of itself, and neither links nor pickles lead it where it was not sent."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from truetune.recipe import load_recipe
from truetune.run import train
from truetune.run_model import check_adapter
from truetune.train.errors import TrainError

# In every Python process that is started below: whoever looks a name up or connects is written down and refused.
WATCH = """
import sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.connect"):
        if not (event == "socket.connect" and isinstance(arguments[1], str)):  # a socket file
            with open({log!r}, "a") as file:
                file.write(f"{{event}} {{arguments[-1] if event.endswith('connect') else arguments[0]}}\\n")
            raise OSError("no network here")
sys.addaudithook(watch)
"""


@pytest.fixture
def watched(tmp_path):
    """watched(program) -> what it tried to reach, one a line. Nothing tells it that it is offline, nor to be quiet."""
    log = tmp_path / "reached.txt"
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH.format(log=str(log)))
    quiet = (
        "HF_HUB_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "TRANSFORMERS_OFFLINE",
        "DO_NOT_TRACK",
        "HF_DATASETS_OFFLINE",
    )
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    paths = [str(tmp_path / "watch"), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def watched(*words: str) -> list[str]:
        done = subprocess.run([sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines() if log.exists() else []

    return watched


RUN = ["--model", "builtin:demo", "--data", "builtin:demo", "max_length=128", "training.max_steps=2"]


def test_a_run_reaches_nobody(watched, tmp_path):
    assert watched("-m", "truetune", "train", *RUN, "--output", "out", "eval_data=0.1") == []
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert watched("-m", "truetune", "check", *RUN) == []
    assert watched("-m", "truetune", "train", *RUN, "--output", "again", "adapter=out") == []


def test_who_reaches_somebody_is_seen(watched):
    reach = "import contextlib, socket\nwith contextlib.suppress(OSError): socket.create_connection(('127.0.0.1', 9))"
    assert watched("-c", reach) == ["socket.getaddrinfo 127.0.0.1"]


def links(output: Path, away: Path) -> dict[str, Path]:
    """Names that a run writes to, and where links of these names would lead it."""
    return {
        "checkpoint-1": away,
        ".saving": away,
        ".run.json.new": away / "run.json",
        "metrics.jsonl": away / "metrics.jsonl",
        "checkpoint-9/optimizer.pt": away / "optimizer.pt",
        "runs": Path(os.path.relpath(away, output)),
    }


@pytest.mark.parametrize("name", links(Path("a"), Path("b")))
@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_no_link_leads_a_run_out_of_its_output(tmp_path, name, option):
    output, away = tmp_path / "out", tmp_path / "away"
    away.mkdir()
    (output / name).parent.mkdir(parents=True)
    (output / name).symlink_to(links(output, away)[name])
    recipe = load_recipe(None, ["model=builtin:demo", "data=builtin:demo", f"output_dir={output}"])
    with pytest.raises(TrainError, match=rf"{name} is a link that leads out of the output directory, to .*: remove it"):
        train(recipe, **{option: True})
    assert not list(away.iterdir())


def test_a_link_to_the_output_itself_and_within_it_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    (tmp_path / "elsewhere" / "latest").symlink_to("notes.txt")
    (tmp_path / "out").symlink_to("elsewhere")
    words = ["max_length=128", "training.max_steps=1", "preflight=off", f"output_dir={tmp_path / 'out'}"]
    train(load_recipe(None, ["model=builtin:demo", "data=builtin:demo", *words]), overwrite=True)
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "elsewhere" / "latest").read_text() == "mine"


def test_a_pickled_adapter_of_the_hub_is_refused(tmp_path, monkeypatch):
    """As downloaded before: PEFT takes adapter_model.bin where there are no safetensors."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--somebody--adapter" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--somebody--adapter" / "refs").mkdir()
    (tmp_path / "models--somebody--adapter" / "refs" / "main").write_text("0" * 40)
    model = str(tmp_path / "model")
    config = {"peft_type": "LORA", "base_model_name_or_path": model, "r": 2}
    (snapshot / "adapter_config.json").write_text(json.dumps(config))
    (snapshot / "adapter_model.bin").write_bytes(pickle.dumps({}))
    words = [f"model={model}", "data=x.jsonl", "adapter=somebody/adapter"]
    with pytest.raises(TrainError, match=r"somebody/adapter has no adapter_model\.safetensors, and pickled weights"):
        check_adapter(load_recipe(None, words))
    (snapshot / "adapter_model.safetensors").write_bytes(b"")
    check_adapter(load_recipe(None, words))
