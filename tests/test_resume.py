"""Runs that are killed once at each phase and go on: to the bit the run that was not killed. The matrix: tests/soak."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from killed_run import LORA, PHASES, Run, assert_same_to_the_bit, write_rows
from truetune import demo
from truetune.run_resume import differences
from truetune.train.checkpoints import FILES, STATE, checkpoint_step, last_checkpoint

EMBEDDINGS = {
    **LORA,
    "lora.modules_to_save": "[embed_tokens, lm_head]",
    "training.embedding_learning_rate": "1e-3",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data) -> Run:
    run = Run(tmp_path_factory.mktemp("runs") / "whole", data, EMBEDDINGS)
    run.finish()
    return run


# -- killed, and gone on with ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "between micro-batches"])
def test_a_run_killed_at_any_phase_goes_on_to_the_bit(tmp_path, data, whole, phase):
    run = Run(tmp_path / "run", data, EMBEDDINGS)
    run.killed(phase, 4)
    run.finish(*run.how_to_go_on())
    assert_same_to_the_bit(run, whole)


def test_a_run_killed_before_its_first_checkpoint_goes_on_from_the_start(tmp_path, data, whole):
    run = Run(tmp_path / "run", data, EMBEDDINGS)
    run.killed("saving the optimizer", 2)
    run.finish("--resume")
    assert run.record["resumed_from"] == [0]
    assert_same_to_the_bit(run, whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "full", "training.optim": "adamw_8bit"},  # bitsandbytes 0.50 has it for CPUs
        # The best checkpoint is the first one here, and the last one is where the run goes on.
        {
            "training.save_strategy": "epoch",
            "training.load_best_model_at_end": "true",
            "training.greater_is_better": "true",
            "training.eval_on_start": "true",
        },
    ],
    ids=["8-bit optimizer", "best model at the end"],
)
def test_other_runs_killed_at_their_end_go_on_to_the_bit(tmp_path, data, settings):
    whole, run = (Run(tmp_path / name, data, {**settings}) for name in ("whole", "run"))
    whole.finish()
    run.killed("optimizer step", 8)
    run.killed("putting the result in place", 0, "--resume")
    run.finish("--resume")
    assert_same_to_the_bit(run, whole)
    if "training.optim" in settings:
        states = torch.load(last_checkpoint(run.output) / "optimizer.pt", weights_only=True)["state"].values()
        assert sum(state["__bnb_optimizer_quant_state__"]["state1"].dtype == torch.uint8 for state in states) > 10


# -- half-written checkpoints ------------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_any_part_is_not_whole(tmp_path, whole):
    newest, older = (whole.output / f"checkpoint-{step}" for step in (9, 8))
    names = sorted(path.name for path in newest.iterdir())
    for part in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", STATE, FILES):
        assert part in names
    for name in names:
        for size in (None, 0, (newest / name).stat().st_size // 2):
            output = tmp_path / "run"
            for place in (newest, older):
                shutil.copytree(place, output / place.name)
            file = output / newest.name / name
            if size is None:
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:size])
            assert checkpoint_step(output / newest.name) is None, (name, size)
            assert last_checkpoint(output) == output / older.name
            shutil.rmtree(output)
    assert last_checkpoint(whole.output) == newest and checkpoint_step(newest) == 9


# -- changed runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path) -> Run:
    """A run with a checkpoint, from a model directory and a file of rows of its own."""
    shutil.copytree(demo.resolve_model(demo.BUILTIN), tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "training.max_steps": "2", "eval_data": "null", **LORA}
    run = Run(tmp_path / "run", write_rows(tmp_path / "rows.jsonl"), {**settings, "training.eval_strategy": "no"})
    run.killed("putting the result in place", 0)
    return run


def refused(run: Run, **settings: str) -> str:
    run = run.but({key.replace("__", "."): value for key, value in settings.items()})
    process = run.start("--resume")
    process.join()
    assert process.exitcode == 2, run.said
    said = " ".join(run.said.split())
    assert "holds another run, to be replaced with --overwrite" in said and "Traceback" not in said
    return said


def test_what_changed_stops_a_resumed_run_by_name_until_it_is_allowed(begun, tmp_path):
    rows = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:-1]))
    said = refused(begun)
    assert "the training data changed, from 40 documents of" in said and "to 39 documents of" in said
    assert "allow: [changed_data]" in said and "changed_template" not in said
    (tmp_path / "rows.jsonl").write_text("".join(rows))

    template = tmp_path / "model" / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + "\n")
    assert "the text of the chat template changed (" in (said := refused(begun, allow="[changed_data]"))
    assert "allow: [changed_template]" in said
    template.write_text(before)

    record = begun.record
    record["environment"]["versions"]["torch"] = "2.1.0"
    (begun.output / "run.json").write_text(json.dumps(record))
    said = refused(begun)
    assert f"torch was 2.1.0 and is {torch.__version__} (" in said and "allow: [changed_versions]" in said

    changed = {"lora__target_modules": "[q_proj]", "training__learning_rate": "1e-4"}
    said = refused(begun, **changed, allow="[changed_versions]")
    assert "lora.target_modules was all-linear and is ['q_proj']" in said
    assert "training.learning_rate was 0.003 and is 0.0001 (" in said and "allow: [changed_recipe]" in said
    said = refused(begun, **changed, allow="[changed_versions, changed_recipe]")
    assert "k_proj.lora_A.default.weight is trained as nothing and was as 2 of float32 [4, 128]" in said
    assert "allow: [changed_trainable]" in said

    begun.but({"allow": "[changed_versions]"}).finish("--resume")
    assert begun.record["environment"]["versions"]["torch"] == torch.__version__


def test_a_checkpoint_that_does_not_fit_what_is_trained_is_refused_though_allowed(begun):
    process = begun.but({"lora.r": "8", "allow": "[changed_recipe, changed_trainable]"}).start("--resume")
    process.join()
    assert process.exitcode == 2, begun.said
    assert "does not fit what is trained now" in begun.said and "Traceback" not in begun.said


def test_each_difference_has_the_name_that_allows_it(whole):
    record = whole.record
    assert differences(record, record) == {}
    changes = {
        "changed_recipe": ("recipe", "max_length"),
        "changed_plan": ("plan", "packs_a_step"),
        "changed_processes": ("processes",),
        "changed_versions": ("environment", "versions", "peft"),
        "changed_data": ("hashes", "eval_data"),
        "changed_template": ("recipe", "chat_template"),
        "changed_weights": ("hashes", "weights"),
        "changed_trainable": ("trainable", "lm_head"),
    }
    for name, (*parts, key) in changes.items():
        now = json.loads(json.dumps(record))
        place = now
        for part in parts:
            place = place[part]
        place[key] = "another"
        assert list(differences(record, now)) == [name]
    early = {key: value for key, value in record.items() if key != "trainable"}
    assert differences(record, early) == {}  # not known before the weights are loaded
    moved = json.loads(json.dumps(record))
    moved["recipe"] |= {"output_dir": "elsewhere", "allow": ["changed_data"]}
    assert differences(record, moved) == {}
