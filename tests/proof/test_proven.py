"""A sweep proves once what its runs share, and again whatever may have changed."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from truetune import demo, run, run_proven, run_record
from truetune.proof import preflight as preflight_module
from truetune.proof.errors import ProofError
from truetune.proof.proven import REUSED
from truetune.recipe import load_recipe

AUDIT = {
    "supervised tokens", "token ids", "sources", "roles", "labels", "first tokens", "turn ends", "prompts",
    "truncation", "duplicates", "answers", "turn starts", "chat template", "token rows",
}  # fmt: skip
PROVEN = AUDIT | {"leak probe", "reference parity", "export"}
MADE_AGAIN = {
    "weights",
    "adapter targets",
    "schedule",
    "attention",
    "layers",
    "loss",
    "batches",
    "disk",
    "trained tensors",
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory, the current one, with the built-in model and some of its data, and a cache of its own."""
    model, data = demo.resolve_model(demo.BUILTIN), demo.resolve_data(demo.BUILTIN, "train")
    shutil.copytree(model, tmp_path / "model")
    lines = Path(data).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "chats.jsonl").write_text("".join(lines[:200]), encoding="utf-8")
    (tmp_path / "others.jsonl").write_text("".join(lines[200:400]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def parity(monkeypatch) -> list[str]:
    """One entry for each time that parity is really worked out."""
    calls = []
    real = preflight_module.check_parity

    def counted(trainer, documents):
        calls.append(trainer.args.output_dir)
        return real(trainer, documents)

    monkeypatch.setattr(preflight_module, "check_parity", counted)
    return calls


def recipe(output: str, *changes: str):
    words = {"model": "model", "data": "chats.jsonl", "max_length": "128", "training.max_steps": "2"}
    words |= {"training.save_strategy": "no", "output_dir": output}
    words |= dict(change.split("=", 1) for change in changes)
    return load_recipe(None, [f"{key}={value}" for key, value in words.items()])


def train(output: str, *changes: str, **options):
    return run.train(recipe(output, *changes), console=Console(quiet=True), **options).trainer


def proof_of(output: str) -> dict[str, dict]:
    return {check["name"]: check for check in json.loads(Path(output, "proof.json").read_text())["checks"]}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def kept(place: Path) -> list[Path]:
    return sorted((place / "cache").rglob("proofs/*"))


SWEEP = ["training.learning_rate=7e-4", "training.seed=7", "training.max_steps=3", "training.warmup_steps=1"]


def test_a_sweep_proves_once_and_trains_as_without(place, parity, capfd):
    train("a")
    assert len(parity) == len(kept(place)) == 1
    first = proof_of("a")
    assert not any(check["proven"] for check in first.values())
    capfd.readouterr()
    swept = train("b", *SWEEP)
    assert parity == ["a"]
    assert "proven before" in " ".join(capfd.readouterr().err.replace("│", " ").split())
    second = proof_of("b")
    assert set(second) == set(first) >= PROVEN | MADE_AGAIN
    assert {name for name, check in second.items() if check["proven"]} == PROVEN
    assert {check["proven"] for name, check in second.items() if name in PROVEN} == {run_record._now()[:10]}
    assert all({**second[name], "proven": ""} == first[name] for name in PROVEN)
    shutil.rmtree(place / "cache" / "truetune" / "proofs")
    assert losses(train("c", *SWEEP)) == losses(swept)
    assert parity == ["a", "c"]


def test_full_fine_tuning_finds_its_proof_too(place, parity):
    for name in ("a", "b"):
        train(name, "method=full", f"training.learning_rate=1e-{len(parity) + 4}")
    assert parity == ["a"]
    assert {name for name, check in proof_of("b").items() if check["proven"]} == PROVEN


def test_going_on_with_a_run_finds_its_proof(place, parity):
    train("a", "training.save_strategy=steps", "training.save_steps=1", "training.max_steps=2")
    train("a", "training.save_strategy=steps", "training.save_steps=1", "training.max_steps=2", resume=True)
    train("a", overwrite=True)
    assert parity == ["a"]


def other_rows(place):
    (place / "others.jsonl").replace(place / "chats.jsonl")


def one_weight(place):
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    with torch.no_grad():
        weights[name].view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})


def in_json(name: str, key: str, value):
    def change(place):
        path = place / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


def template(place):
    path = place / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another, which writes the same #}")


def nothing(place):
    pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_rows, []),
        (nothing, ["data=others.jsonl"]),
        (one_weight, []),
        (in_json("config.json", "rms_norm_eps", 1e-3), []),
        (in_json("generation_config.json", "eos_token_id", [1, 3]), []),
        (template, []),
        (nothing, ["max_length=96"]),
        (nothing, ["lora.r=4"]),
        (nothing, ["lora.lora_alpha=64"]),
        (nothing, ["precision=bf16"]),
        (nothing, ["training.per_device_train_batch_size=2"]),
        (nothing, ["training.preflight_limits={supervised: 0.01}"]),
        (nothing, ["training.activation_policy=lean"]),
        (nothing, ["training.fuse=false"]),
        (nothing, ["allow=[disk]"]),
    ],
)
def test_whatever_may_decide_a_check_has_it_made_again(place, parity, change, words):
    train("a")
    change(place)
    train("b", *words)
    assert parity == ["a", "b"]
    assert not any(check["proven"] for check in proof_of("b").values())


@pytest.mark.parametrize("what", ["package", "device", "code"])
def test_other_versions_devices_and_code_have_it_made_again(place, parity, monkeypatch, what):
    train("a")
    if what == "code":
        monkeypatch.setattr(run_proven, "code_hash", lambda: "other")
    else:
        found = run_record.environment()
        changed = {"versions": {**found["versions"], "peft": "99.0"}} if what == "package" else {"devices": ["other"]}
        monkeypatch.setattr(run_record, "environment", lambda: {**found, **changed})
    train("b")
    assert parity == ["a", "b"]


def test_the_code_is_all_of_this_package(tmp_path, monkeypatch):
    package = shutil.copytree(Path(run_proven.truetune.__file__).parent, tmp_path / "truetune")
    before = run_proven.code_hash()
    monkeypatch.setattr(run_proven.truetune, "__file__", str(package / "__init__.py"))
    assert run_proven.code_hash() == before
    with (package / "ops" / "rope.py").open("a") as file:
        file.write("#\n")
    assert run_proven.code_hash() != before


def test_a_failure_is_never_kept(place, parity):
    strict = "training.preflight_limits={supervised: 0.99}"
    for name in ("a", "b"):
        with pytest.raises(ProofError, match="supervised tokens"):
            train(name, strict)
    assert parity == ["a", "b"] and not kept(place)


def test_a_check_that_broke_or_ran_out_of_memory_is_not_kept(place, parity, monkeypatch):
    real = preflight_module.check_export
    for error in (OSError("no"), torch.OutOfMemoryError("no")):

        def broken(model, error=error):
            raise error

        monkeypatch.setattr(preflight_module, "check_export", broken)
        train("a", overwrite=True)
        assert not kept(place)
    monkeypatch.setattr(preflight_module, "check_export", real)
    train("a", overwrite=True)
    assert len(kept(place)) == 1


def test_probes_that_had_no_documents_are_not_kept(place, parity, monkeypatch):
    def broken(batch):
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(preflight_module, "documents_of", broken)
        train("a")
    assert {proof_of("a")[name]["verdict"] for name in ("leak probe", "reference parity")} == {"skip"}
    with monkeypatch.context() as patch:
        patch.setattr(preflight_module, "documents_of", lambda batch: [])
        train("b")
    assert not kept(place)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-40],
        lambda text: text.replace("0 differ", "1 differ"),
        lambda text: "\0" * 100,
        lambda text: text.partition("\n")[2],
    ],
)
def test_a_damaged_proof_is_none_and_is_replaced(place, parity, damage):
    train("a")
    [path] = kept(place)
    text = path.read_text()
    path.write_text(damaged := damage(text))
    assert damaged != text
    train("b")
    assert parity == ["a", "b"]
    train("c")
    assert parity == ["a", "b"] and kept(place) == [path]


def test_check_always_makes_every_check(place, parity):
    train("a")
    proof = run.check(recipe("b"), Console(file=io.StringIO()))
    assert len(parity) == 2 and not any(check.proven for check in proof.checks)


def test_other_levels_and_the_code_of_others_keep_nothing(place, parity):
    train("a", "preflight=quick")
    train("b", "training.trust_remote_code=true")
    assert len(parity) == 2 and not kept(place)


def test_a_cache_that_cannot_be_written_stops_no_run(place, parity, monkeypatch):
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    train("a")
    assert parity == ["a"] and os.path.exists("a/proof.json")


def test_what_is_reused_is_what_the_preflight_names(place):
    names = []
    train("a")
    names = json.loads(kept(place)[0].read_text().split("\n", 1)[1])["checks"]
    assert set(names) == set(REUSED)
    assert {check["name"] for checks in names.values() for check in checks} == PROVEN
