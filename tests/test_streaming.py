"""`streaming: true`: GSM8K read while it is trained, with a small Llama from scratch."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from test_run import arguments, command, logged, run, save_llama
from truetune.cli import main
from truetune.data.errors import DataError
from truetune.train.checkpoints import last_checkpoint

ROWS = 28
STEPS = 9  # of 4 packs; a pass over the rows has fewer packs than that


@pytest.fixture(scope="module")
def settings(tmp_path_factory, gsm8k_path, _trained_tokenizer) -> dict[str, str]:
    path = tmp_path_factory.mktemp("stream")
    lines = gsm8k_path.open(encoding="utf-8").readlines()
    (path / "gsm8k.jsonl").write_text("".join(lines[:ROWS]), encoding="utf-8")
    (path / "held_out.jsonl").write_text("".join(lines[ROWS : ROWS + 5]), encoding="utf-8")
    columns = "columns: {user: question, assistant: answer}"
    return {
        "model": str(save_llama(path / "llama", _trained_tokenizer)),
        "data": f"[{{path: {path}/gsm8k.jsonl, {columns}}}]",
        "eval_data": f"[{{path: {path}/held_out.jsonl, {columns}}}]",
        "streaming": "true",
        "max_length": "320",
        "lora.modules_to_save": "[lm_head]",
        "training.max_steps": str(STEPS),
        "training.learning_rate": "5e-3",
        "training.save_steps": "3",
        "training.per_device_train_batch_size": "1",
        "training.gradient_checkpointing": "false",
    }


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, settings):
    """The run that others are compared with, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "streamed"
    with (output.parent / "said.txt").open("w+") as said:
        result = run(output, settings, console=Console(file=said, width=200))
        said.seek(0)
        return result, said.read()


def test_a_streamed_run_learns_over_several_passes(streamed):
    result, said = streamed
    losses = logged(result.output_dir)
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.5
    assert logged(result.output_dir, "eval", "eval_loss")[STEPS] < losses[1] - 0.5
    record = json.loads((result.output_dir / "run.json").read_text())
    assert record["plan"]["packs"] is record["plan"]["fill"] is record["plan"]["conversations"] is None
    assert (record["plan"]["packs_a_step"], record["plan"]["steps"]) == (4, STEPS)
    assert record["data"]["rows"] == ROWS
    assert record["data"]["documents"] == ROWS
    assert logged(result.output_dir, name="num_tokens")[STEPS] > record["data"]["tokens"]  # more than a pass
    assert "packs and their fill are unknown" in said and f"{STEPS} steps in all" in said
    assert f"{ROWS} conversations -> {ROWS} documents" in said


def test_a_streamed_run_goes_on_where_it_was(tmp_path, settings, streamed):
    result, _ = streamed
    output = tmp_path / "run"
    shutil.copytree(result.output_dir, output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    assert last_checkpoint(output) == output / "checkpoint-6"
    run(output, settings, resume=True)
    for name in ("loss", "num_tokens", "learning_rate"):
        assert logged(output, name=name) == pytest.approx(logged(result.output_dir, name=name), rel=1e-6)


def test_two_processes_share_a_stream_and_give_the_losses_of_one(tmp_path, settings, streamed):
    words = [*arguments(tmp_path / "run", settings), "--num-processes", "2"]
    done = subprocess.run(command(*words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("loss", "num_tokens"):
        expected = logged(streamed[0].output_dir, name=name)
        assert logged(tmp_path / "run", name=name) == pytest.approx(expected, rel=1e-5)


def test_streaming_without_packing_trains_single_documents(tmp_path, settings):
    options = settings | {"packing": "false", "training.max_steps": "8", "training.dataloader_num_workers": "1"}
    run(tmp_path / "run", options)
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    # 32 documents: a pass over all 28 rows, and 4 of the next.
    assert counts["tokens"] < logged(tmp_path / "run", name="num_tokens")[8] < counts["tokens"] * 1.4


def test_a_row_that_cannot_be_read_ends_the_run_with_its_place(tmp_path, settings):
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"prompt": "How many? ", "completion": "4"}) + "\n"
    path.write_text(good * 6000 + "{\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:6001: malformed JSON"):
        run(tmp_path / "run", settings | {"data": str(path), "eval_data": "null", "training.max_steps": "1000"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.max_steps": "-1"}, "set `training.max_steps`"),
        ({"eval_data": "0.1"}, "give `eval_data` sources of its own"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_in_one_sentence(tmp_path, settings, capsys, changes, said):
    with pytest.raises(SystemExit) as exited:
        main(["train", *arguments(tmp_path / "run", settings | changes)])
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "`streaming: true` does not know" in error and said in error
    assert not (tmp_path / "run").exists()


def test_inspect_shows_the_first_rows_of_a_stream(settings, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["inspect", *arguments(Path("nowhere"), settings), "--json"])
    said = capsys.readouterr()
    assert exited.value.code == 0, said.err
    *lines, last = map(json.loads, said.out.splitlines())
    assert f"first {ROWS} rows" in said.err
    assert len(lines) == last["summary"]["rows"] == ROWS
