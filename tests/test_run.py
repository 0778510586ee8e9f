"""Runs on GSM8K with a small Llama from scratch: what they learn, leave behind, and survive."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from real_text import train_tokenizer
from truetune.data.rows import Row, RowSet
from truetune.models.errors import ModelError
from truetune.recipe import load_recipe
from truetune.run import train
from truetune.run_data import split_rows
from truetune.run_record import MetricsFile, weights_hash, write_json
from truetune.train.checkpoints import last_checkpoint
from truetune.train.errors import TrainError

ROWS = 28
EPOCHS = 2  # of 5 steps, the last one with fewer packs than the others


def save_llama(path: Path, tokenizer, *, tied: bool = False) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory, _trained_tokenizer) -> Path:
    return save_llama(tmp_path_factory.mktemp("models") / "llama", _trained_tokenizer)


@pytest.fixture(scope="module")
def bare_llama(tmp_path_factory, gsm8k_rows) -> Path:
    """600 tokens, none of them special but the end of a text; beside it the same with a tied head, `tied`."""
    texts = [row["question"] + row["answer"] for row in gsm8k_rows[:100]]
    tokenizer = train_tokenizer(texts, special_tokens=("<|endoftext|>",), vocab_size=600)
    path = tmp_path_factory.mktemp("models")
    save_llama(path / "tied", tokenizer, tied=True)
    return save_llama(path / "bare", tokenizer)


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory, gsm8k_path) -> Path:
    path = tmp_path_factory.mktemp("data") / "gsm8k.jsonl"
    path.write_text("".join(gsm8k_path.open(encoding="utf-8").readlines()[:ROWS]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def settings(llama, gsm8k) -> dict[str, str]:
    """A recipe, all but its output."""
    return {
        "model": str(llama),
        "data": f"[{{path: {gsm8k}, columns: {{user: question, assistant: answer}}}}]",
        "eval_data": "0.1",
        "max_length": "320",
        "training.learning_rate": "5e-3",
        "training.num_train_epochs": str(EPOCHS),
        "training.per_device_train_batch_size": "1",
        "training.gradient_checkpointing": "false",
    }


@pytest.fixture(scope="module")
def lora_settings(settings) -> dict[str, str]:
    """With a head that is trained: an adapter alone teaches random weights little in a dozen steps."""
    return settings | {"lora.modules_to_save": "[lm_head]"}


def arguments(output: Path, settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()] + [f"output_dir={output}"]


def run(output: Path, settings: dict[str, str], **options):
    console = Console(file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    return train(load_recipe(None, arguments(output, settings)), **{"console": console, **options})


def logged(output: Path, kind: str = "train", name: str = "loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    values = [(line["step"], line[name]) for line in lines if line["kind"] == kind]
    assert len(values) == len(dict(values)), "a step stands twice in metrics.jsonl"
    return dict(values)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, lora_settings):
    """The run from start to end that others are compared with."""
    return run(tmp_path_factory.mktemp("runs") / "lora", lora_settings)


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "truetune", "train", *words]


def wait_for_step(output: Path, step: int, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").is_file() or step not in logged(output):
        assert time.monotonic() < deadline and (process is None or process.poll() is None), "it never got there"
        time.sleep(0.01)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_lora_learns_gsm8k(lora_run):
    losses = logged(lora_run.output_dir)
    assert list(losses) == list(range(1, lora_run.plan.steps + 1))
    assert losses[lora_run.plan.steps] < losses[1] - 1
    assert logged(lora_run.output_dir, "eval", "eval_loss")[lora_run.plan.steps] < losses[1] - 1


def test_full_fine_tuning_learns_gsm8k_and_saves_a_plain_model(tmp_path, settings):
    result = run(tmp_path / "full", settings | {"method": "full"})
    losses = logged(tmp_path / "full")
    assert losses[result.plan.steps] < losses[1] - 0.5
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    weights = result.trainer.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in saved.state_dict().items())
    assert "truetune" not in (tmp_path / "full" / "config.json").read_text()


@pytest.mark.parametrize("weights", [{"method": "qlora"}, {"precision": "bf16"}])
def test_adapter_stays_in_fp32_on_low_precision_weights(tmp_path, settings, weights):
    result = run(
        tmp_path / "run", settings | weights | {"lora.modules_to_save": "[lm_head]", "training.max_steps": "2"}
    )
    trained = [p for p in result.trainer.model.parameters() if p.requires_grad]
    assert trained and {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in result.trainer.model.parameters()} != {torch.float32}
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_steps_are_those_announced_without_packing_too(tmp_path, settings, lora_run):
    assert lora_run.trainer.state.global_step == lora_run.plan.steps == EPOCHS * lora_run.plan.steps_an_epoch
    single = run(tmp_path / "run", settings | {"packing": "false", "training.num_train_epochs": "1"})
    assert single.plan.packs == single.plan.documents > lora_run.plan.packs
    assert single.trainer.state.global_step == single.plan.steps > lora_run.plan.steps_an_epoch


# -- what is left behind -----------------------------------------------------------------------------------------------


def test_output_holds_everything_that_explains_the_run(lora_run, llama, gsm8k):
    output = lora_run.output_dir
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished" and record["seed"] == 42
    assert record["hashes"]["weights"] == weights_hash(llama)
    for name in ("data", "eval_data", "pack_order"):
        assert len(record["hashes"][name]) == 64
    assert record["attention_backend"] in record["report"]["attention_calls"]
    assert record["report"]["lines"] and record["report"]["groups"]
    assert any(line.startswith("torch==") for line in record["environment"]["pip_freeze"])
    assert record["plan"]["steps"] == record["result"]["steps"] == lora_run.plan.steps
    assert record["result"]["eval_loss"] == pytest.approx(
        logged(output, "eval", "eval_loss")[lora_run.plan.steps], rel=1e-6
    )
    recipe = load_recipe(str(output / "recipe.yaml"))
    assert recipe.to_dict() == yaml.safe_load((output / "recipe.yaml").read_text()) == record["recipe"]
    assert len(list(output.glob("checkpoint-*"))) == 2
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_every_key_of_the_record_and_the_metrics_is_documented(lora_run):
    documented = (Path(__file__).parents[1] / "docs" / "output.md").read_text()
    record = json.loads((lora_run.output_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (lora_run.output_dir / "metrics.jsonl").read_text().splitlines()]
    keys = {key for part in (record, *lines) for key in part}
    keys |= {key for part in ("plan", "hashes", "environment", "result") for key in record[part]}
    assert not [key for key in sorted(keys) if f"`{key}`" not in documented]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_several_sources_have_losses_and_counts_of_their_own(tmp_path, settings, gsm8k, streaming):
    """The second source's answers are all one word, which is soon learnt: its loss tells whose is whose."""
    (tmp_path / "words.jsonl").write_text(
        "".join(f'{{"user": "Say {i} yes", "assistant": "yes yes yes yes"}}\n' for i in range(60))
    )
    sources = f"[{settings['data'][1:-1]}, {{path: {tmp_path}/words.jsonl}}]"
    several = {"data": sources, "eval_data": sources, "streaming": streaming, "method": "full",
               "training.max_steps": "30",
               "training.eval_strategy": "steps", "training.eval_steps": "30"}  # fmt: skip
    output = run(tmp_path / "run", settings | several, overwrite=True).output_dir
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    train, last = [line for line in lines if line["kind"] == "train"], lines[-1]
    assert any({"loss_source_gsm8k", "loss_source_words"} <= line.keys() for line in train)
    assert last["eval_loss_source_words"] < 0.5 * last["eval_loss_source_gsm8k"]
    assert all(line["memory_gib"] > 0.1 for line in train)
    documented = (Path(__file__).parents[1] / "docs" / "output.md").read_text()
    assert "`loss_source_<name>`" in documented and "`memory_gib`" in documented
    proof = json.loads((output / "proof.json").read_text())
    checks = {check["name"]: check for check in proof["checks"]}
    assert checks["losses by source"]["seen"] == (
        f"loss_source_gsm8k: {gsm8k}; loss_source_words: {tmp_path}/words.jsonl"
    )
    if streaming == "false":
        counts = json.loads((output / "run.json").read_text())["data"]
        found = checks["sources"]["details"]
        assert found[str(gsm8k)]["rows"] == ROWS and found[f"{tmp_path}/words.jsonl"]["rows"] == 60
        assert sum(of["supervised"] for of in found.values()) == counts["supervised"]
        roles = checks["roles"]["details"]
        assert roles["assistant"]["supervised"] == counts["supervised"] and roles["prompt"]["supervised"] == 0
        assert f"assistant: {ROWS + 60} rows" in checks["roles"]["seen"]


LOAD = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
for path in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoPeftModelForCausalLM.from_pretrained(path).eval()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "How many?"}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.save((ids, model(ids).logits, tokenizer.eos_token), path + ".pt")
assert not [name for name in sys.modules if name.startswith("truetune")]
"""


def test_peft_alone_loads_the_adapter_and_gives_the_trainers_logits(tmp_path, settings, lora_run, bare_llama):
    """Also where a chat template brought special tokens that the model did not have, with a tied head and without."""
    results = [lora_run]
    for tied in (False, True):
        model = bare_llama.with_name("tied") if tied else bare_llama
        changed = settings | {
            "model": str(model),
            "revision": "v1",
            "chat_template": "chatml",
            "training.max_steps": "3",
        }
        results.append(run(tmp_path / f"run{tied:d}", changed))
    paths = [str(result.output_dir) for result in results]
    subprocess.run([sys.executable, "-c", LOAD, *paths], check=True, capture_output=True)
    for result, path in zip(results, paths, strict=True):
        ids, logits, eos = torch.load(path + ".pt")
        model = result.trainer.model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
            with model.disable_adapter():
                assert not torch.allclose(model(ids).logits, logits, atol=1e-2)
        assert eos == "<|im_end|>"

    for tied, result in enumerate(results[1:]):
        assert json.loads((result.output_dir / "adapter_config.json").read_text())["revision"] == "v1"
        saved = load_file(result.output_dir / "adapter_model.safetensors")
        new_rows = {name: tensor for name, tensor in saved.items() if "lora" not in name}
        assert [tuple(tensor.shape) for tensor in new_rows.values()] == [(2, 64)] * (1 if tied else 2)
        started = result.trainer.model.get_base_model().get_input_embeddings().token_adapter
        for row in new_rows.values():  # trained, away from the mean at which they began
            assert not torch.allclose(row, started.trainable_tokens_original["default"], atol=1e-3)


def test_new_special_tokens_are_in_a_model_trained_in_full_and_in_an_adapter_trained_on(tmp_path, settings, bare_llama):
    options = settings | {"model": str(bare_llama), "training.max_steps": "1"}
    first = run(tmp_path / "first", options | {"chat_template": "chatml"}).output_dir
    again = run(tmp_path / "again", options | {"adapter": str(first), "training.learning_rate": "0"}).output_dir
    expected, saved = (load_file(path / "adapter_model.safetensors") for path in (first, again))
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)

    full = run(tmp_path / "full", options | {"chat_template": "chatml", "method": "full"}).output_dir
    rows = load_file(full / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert rows == json.loads((full / "config.json").read_text())["vocab_size"] == 602
    with pytest.raises(TrainError, match="needs 3 special tokens"):
        run(tmp_path / "no", options | {"adapter": str(first), "chat_template": "llama3"})


def test_metrics_that_are_no_numbers_are_null(tmp_path):
    write_json(tmp_path / "run.json", {"loss": float("nan"), "steps": [1, float("inf")]})
    assert json.loads((tmp_path / "run.json").read_text()) == {"loss": None, "steps": [1, None]}
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.append({"step": 1, "loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_weights_hash_sees_every_small_change(tmp_path):
    content = bytes(range(256)) * 4096 * 80  # 80 MiB: read in part
    (tmp_path / "model.safetensors").write_bytes(content)
    before = weights_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content[:-1] + b"\0")
    assert weights_hash(tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(content + b"\0")
    assert weights_hash(tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(content)
    assert weights_hash(tmp_path) == before


# -- stopping and going on ---------------------------------------------------------------------------------------------


def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path, lora_settings, lora_run):
    output = tmp_path / "run"
    with subprocess.Popen(command(*arguments(output, lora_settings)), stdout=-3, stderr=-3) as process:
        wait_for_step(output, lora_run.plan.steps - 4, process)
        process.kill()
    checkpoint = last_checkpoint(output)
    assert checkpoint is not None and not (output / "adapter_model.safetensors").exists()
    cut_short = output / f"checkpoint-{lora_run.plan.steps - 1}"  # what a kill in the middle of saving leaves
    cut_short.mkdir(exist_ok=True)
    (cut_short / "trainer_state.json").write_text('{"global_step": ')
    with (output / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "st')

    run(output, lora_settings, resume=True)
    for kind, name in (("train", "loss"), ("eval", "eval_loss"), ("train", "learning_rate"), ("train", "num_tokens")):
        expected = logged(lora_run.output_dir, kind, name)
        assert logged(output, kind, name) == pytest.approx(expected, rel=1e-6)
    expected = load_file(lora_run.output_dir / "adapter_model.safetensors")
    for name, tensor in load_file(output / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished" and record["resumed_from"] == [int(checkpoint.name.split("-")[1])]


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(tmp_path, lora_settings, lora_run, capsys):
    output = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)  # not Python's own where the tests run in the background

    def press_ctrl_c() -> None:
        wait_for_step(output, 4)
        os.kill(os.getpid(), signal.SIGINT)

    presses = threading.Thread(target=press_ctrl_c)
    presses.start()
    result = run(output, lora_settings, console=Console(width=200))
    presses.join()
    assert result.interrupted and result.exit_code == 130
    said = capsys.readouterr().out
    step = result.trainer.state.global_step
    assert last_checkpoint(output) == output / f"checkpoint-{step}"
    assert f"checkpoint-{step}" in said and "--resume" in said
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before

    assert not run(output, lora_settings, resume=True).interrupted
    assert logged(output) == pytest.approx(logged(lora_run.output_dir), rel=1e-6)


def test_a_run_killed_between_its_last_step_and_its_end_is_finished_by_resume(tmp_path, settings, lora_run):
    import shutil

    output = tmp_path / "run"
    options = settings | {"training.max_steps": "3", "training.save_steps": "3"}
    steps = run(output, options).plan.steps
    expected = load_file(output / "adapter_model.safetensors")
    (output / "adapter_model.safetensors").unlink()
    shutil.rmtree(output / "checkpoint-1", ignore_errors=True)
    run(output, options, resume=True)
    saved = load_file(output / "adapter_model.safetensors")
    assert list(logged(output)) == list(range(1, steps + 1))
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())


def test_resume_goes_on_only_with_the_run_that_was_begun(tmp_path, settings):
    output = tmp_path / "run"
    options = settings | {"training.max_steps": "2"}
    with pytest.raises(TrainError, match="no complete checkpoint"):
        run(output, options, resume=True)
    run(output, options)
    with pytest.raises(TrainError, match=r"training\.learning_rate was 0\.005 and is 0\.001.*changed_recipe"):
        run(output, options | {"training.learning_rate": "1e-3"}, resume=True)
    with pytest.raises(TrainError, match="one of them"):
        run(output, options, resume=True, overwrite=True)


# -- the output directory ----------------------------------------------------------------------------------------------


def test_output_that_is_not_empty_is_refused_and_overwriting_takes_only_what_runs_write(tmp_path, settings):
    output = tmp_path / "run"
    (output / "checkpoint-7").mkdir(parents=True)
    for name in ("notes.txt", "adapter_model.safetensors", "checkpoint-7/trainer_state.json"):
        (output / name).write_text("mine")
    options = settings | {"method": "full", "training.max_steps": "1"}
    with pytest.raises(TrainError, match="is not empty: go on there with --resume"):
        run(output, options)
    run(output, options, overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "adapter_model.safetensors").exists() and not (output / "checkpoint-7").exists()
    assert (output / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lora.target_modules", "[no_such_module]", "PEFT refuses"),
        ("training.optim", "adamw_anyprecision", "optim.*cannot be had"),
        ("adapter", "no/such/adapter", "no adapter can be loaded"),
        ("model", "no/such/model", "no/such/model"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(tmp_path, settings, key, value, said):
    with pytest.raises((TrainError, ModelError), match=said):
        run(tmp_path / "run", settings | {key: value})
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_and_writes_nothing(tmp_path, lora_settings, lora_run, capsys):
    result = run(tmp_path / "run", lora_settings, dry_run=True, console=Console(width=200))
    assert result.plan == lora_run.plan and result.trainer is None
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    for part in (
        "gsm8k.jsonl",
        f"{ROWS - 3} conversations",
        f"{result.plan.packs} packs",
        f"{result.plan.steps} in all",
    ):
        assert part in said
    assert "tens of steps" in said  # few steps are warned of


# -- models that are refused, adapters that are trained on -------------------------------------------------------------


def test_a_model_whose_documents_would_see_each_other_is_not_packed(tmp_path, settings, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    options = settings | {"model": str(tmp_path / "mamba"), "method": "full"}
    with pytest.raises(TrainError, match=r"would see each other.*packing: false"):
        run(tmp_path / "run", options, dry_run=True)
    with pytest.raises(TrainError, match="would see each other"):  # before what LoRA has against it
        run(tmp_path / "run", options | {"method": "lora", "lora.target_modules": "[nope]"}, dry_run=True)
    run(tmp_path / "run", options | {"packing": "false"}, dry_run=True)


def test_an_adapter_is_trained_on_from_where_it_was(tmp_path, settings, lora_run, llama):
    options = settings | {"adapter": str(lora_run.output_dir), "training.max_steps": "1", "training.learning_rate": "0"}
    run(tmp_path / "run", options)
    before = logged(lora_run.output_dir)
    assert logged(tmp_path / "run")[1] < before[1] - 1
    expected = load_file(lora_run.output_dir / "adapter_model.safetensors")
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)

    os.symlink(llama, tmp_path / "other")
    with pytest.raises(TrainError, match=r"was made on .*adapter_base"):
        run(tmp_path / "run2", options | {"model": str(tmp_path / "other")})


def test_an_adapter_that_began_with_the_weights_own_values_is_trained_on(tmp_path, settings, llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, init_lora_weights="pissa", target_modules="all-linear")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    adapted.save_pretrained(tmp_path / "pissa")
    options = settings | {"adapter": str(tmp_path / "pissa"), "training.max_steps": "1"}
    assert run(tmp_path / "run", options).trainer is not None


# -- data --------------------------------------------------------------------------------------------------------------


def test_no_conversation_is_on_both_sides_of_the_split():
    rows = [Row(messages=[{"role": "user", "content": str(number % 60)}]) for number in range(100)]
    train_rows, eval_rows = split_rows(RowSet(rows, {}, {}, "f"), 0.1, seed=1)
    seen = [{row.messages[0]["content"] for row in side.rows} for side in (train_rows, eval_rows)]
    assert len(seen[1]) == 6 and not seen[0] & seen[1] and len(train_rows.rows) + len(eval_rows.rows) == 100
    assert split_rows(RowSet(rows, {}, {}, "f"), 0.1, seed=1)[1].rows == eval_rows.rows
    assert split_rows(RowSet(rows, {}, {}, "f"), 0.1, seed=2)[1].rows != eval_rows.rows
    assert train_rows.fingerprint != eval_rows.fingerprint


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_give_the_losses_of_one(tmp_path, lora_settings, lora_run):
    words = [*arguments(tmp_path / "run", lora_settings), "--num-processes", "2"]
    done = subprocess.run(command(*words), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/") == 1, "one process speaks for all"
    assert logged(tmp_path / "run") == pytest.approx(logged(lora_run.output_dir), rel=1e-5)
    name = "eval_loss"
    assert logged(tmp_path / "run", "eval", name) == pytest.approx(logged(lora_run.output_dir, "eval", name), rel=1e-5)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["processes"] == 2 and record["plan"] == lora_run.plan.to_dict()
