"""The command line: quick help, what each command shows, and how soon a run begins."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from commands import CHAT, TRAIN, run, save_adapter, write_rows

# -- help, version, init, inspect, doctor ------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from truetune.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'yaml'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    for command in ("train", "inspect", "plan", "doctor", "init", "demo", "run"):
        assert re.search(rf"\b{command}\b", done.stdout)
    assert seconds < 2  # 0.2 s on an idle machine, where the promise is 0.5; tests run beside each other


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "truetune", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)
    done = subprocess.run([sys.executable, "-m", "truetune", "trian"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "truetune: No such command 'trian': did you mean 'train'?\n"


def test_no_command_shows_the_help(capfd):
    code, out, err = run(capfd)
    assert (code, err) == (0, "")
    assert "inspect" in out


def test_init_writes_a_recipe_once(place, capfd):
    from truetune.recipe import recipe_template

    assert run(capfd, "init")[0] == 0
    assert (place / "recipe.yaml").read_text() == recipe_template()
    (place / "recipe.yaml").write_text("model: mine\n")
    code, _, err = run(capfd, "init")
    assert (code, err) == (2, "truetune: There is a file recipe.yaml already: name another, or remove it.\n")
    assert (place / "recipe.yaml").read_text() == "model: mine\n"


@pytest.fixture
def qwen_8b(tmp_path, monkeypatch) -> Path:
    """A directory, the current one, with the config.json of an 8B model in `qwen`, and no weights."""
    from transformers import Qwen3Config

    monkeypatch.chdir(tmp_path)
    config = Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=151936, tie_word_embeddings=False, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "qwen")
    return tmp_path


def test_plan_says_what_fits_from_the_configuration_alone(qwen_8b, capfd):
    recipe = ("--model", "qwen", "--data", "none.jsonl", "max_length=4096", "training.per_device_train_batch_size=4")
    code, out, err = run(capfd, "plan", *recipe, "--memory", "141")
    assert (code, err) == (0, "")
    assert "16,384 tokens a micro-batch; activation policy auto: keep all 36 layers; predicted peak" in out
    assert re.search(r"weights +15\.\d+", out)
    assert "tokens/s a GPU: an estimate from FLOPs" in out
    assert out.endswith("It fits.\n")

    code, out, _ = run(capfd, "plan", *recipe, "--memory", "48", "--json")
    found = json.loads(out)
    assert (code, found["fits"], found["mend"]) == (0, True, None)
    assert found["tokens"] == 16384
    assert len(found["choices"]) == 36
    assert "keep" not in found["choices"] or len(set(found["choices"])) > 1
    assert sum(found["terms"].values()) == found["predicted_peak"]
    assert found["predicted_peak"] + found["margin"] <= found["device_bytes"] == 48 * 2**30

    code, out, _ = run(capfd, "plan", *recipe, "--memory", "16", "--json")
    assert (code, json.loads(out)["fits"]) == (1, False)
    assert "qlora" in json.loads(out)["mend"]
    code, out, _ = run(capfd, "plan", *recipe, "--memory", "16", "--method", "qlora", "--json")
    assert (code, json.loads(out)["fits"]) == (0, True)
    assert json.loads(out)["terms"]["weights"] < 6.5 * 2**30


def test_a_run_says_whether_it_fits_before_any_weight_is_there(qwen_8b):
    import io

    from rich.console import Console

    from truetune.models.load import check_model
    from truetune.recipe import load_recipe
    from truetune.run import training_arguments
    from truetune.run_model import model_path, with_adapter, without_weights
    from truetune.run_plan import print_whether_it_fits

    def said(memory: float, **changes: str) -> str:
        recipe = load_recipe(None, ["max_length=8192"], {"model": "qwen", "data": "none.jsonl", **changes})
        console = Console(file=io.StringIO())
        model = with_adapter(without_weights(check_model(model_path(recipe)), recipe), recipe)
        print_whether_it_fits(model, recipe, training_arguments(recipe), console, memory)
        return console.file.getvalue()

    assert re.fullmatch(r"Memory: keep all 36 layers; predicted peak \d+\.\d GiB of 80\n", said(80))
    assert re.match(r"Warning: this may run out of device memory \(.* of 16\): .*qlora", said(16))
    assert said(16, method="qlora").startswith("Memory: ")


def test_an_adapter_to_go_on_with_is_planned_as_it_was_when_it_was_new(place, capfd):
    save_adapter(place)
    words = ("plan", "--model", "llama", "--data", "chats.jsonl", "--memory", "8", "--json")
    new, old = (json.loads(run(capfd, *words, word)[1])["terms"] for word in ("lora.r=4", "adapter=adapter"))
    assert new["optimizer state"] > 0
    assert new == old


def test_plan_says_what_to_lower_and_that_works(qwen_8b, capfd):
    recipe = ("plan", "--model", "qwen", "--data", "none.jsonl", "--memory", "24", "--json", "max_length=8192")
    code, out, _ = run(capfd, *recipe, "training.per_device_train_batch_size=8")
    mend = json.loads(out)["mend"]
    assert code == 1
    words, rows = mend[:-1], mend[-1]
    assert words == "lower per_device_train_batch_size from 8 to "
    code, out, _ = run(capfd, *recipe, f"training.per_device_train_batch_size={rows}")
    assert (code, json.loads(out)["fits"]) == (0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no GPU here: say for which memory to plan, --memory 80 for one of 80 GiB"),
        (
            ["--memory", "80", "training.gradient_checkpointing_kwargs.use_reentrant=false"],
            "leaves the memory of activations to Transformers",
        ),
        (["--memory", "80", "training.activation_policy=none"], "activation_policy 'none' is unknown"),
        (
            ["--memory", "80", "training.activation_policy=lean", "training.gradient_checkpointing=false"],
            "gradient_checkpointing=False keeps every activation",
        ),
    ],
)
def test_plan_refuses_in_one_sentence(qwen_8b, capfd, words, message):
    code, out, err = run(capfd, "plan", "--model", "qwen", "--data", "none.jsonl", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_inspect_shows_what_is_supervised(place, capfd):
    write_rows(place / "chats.jsonl", [CHAT, {"messages": [*CHAT["messages"], *CHAT["messages"]]}])
    code, out, _ = run(capfd, "inspect", "--model", "llama", "--data", "chats.jsonl", "--json")
    *lines, last = map(json.loads, out.splitlines())
    assert code == 0
    assert [line["row"] for line in lines] == [0, 1]
    assert [line["supervised"] for line in lines] == [["It is 4.<|im_end|>"], ["It is 4.<|im_end|>"] * 2]
    assert lines[0]["text"].startswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>")
    assert len(lines[0]["labels"]) == len(lines[0]["input_ids"])
    assert last["summary"]["rows"] == 2
    assert 0 < last["summary"]["packing_efficiency"] < 1

    code, out, _ = run(capfd, "inspect", "--model", "llama", "--data", "chats.jsonl", "--rows", "1")
    assert code == 0
    assert out.count("What is 2 + 2?") == 1
    assert "packing efficiency" in out


def test_inspect_takes_a_recipe_and_changes(place, capfd):
    (place / "r.yaml").write_text("model: llama\ndata: chats.jsonl\nsupervise: all\n")
    code, out, _ = run(capfd, "inspect", "r.yaml", "supervise=last_response", "--json", "--rows", "1")
    assert code == 0
    assert json.loads(out.splitlines()[0])["supervised"] == ["It is 4.<|im_end|>"]
    assert len(out.splitlines()) == 2


def test_inspect_needs_no_weights(place, tiny_model, capfd):
    bare = place / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (tiny_model / name).is_file():
            (bare / name).write_bytes((tiny_model / name).read_bytes())
    assert run(capfd, "inspect", "--model", "bare", "--data", "chats.jsonl", "--json")[0] == 0


def test_doctor_says_what_is_in_effect_and_why(capfd):
    import torch

    code, out, _ = run(capfd, "doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["memory_gib"] > 0
    names = [backend["name"] for backend in found["attention"]["backends"]]
    for better in found["attention"]["backends"][: names.index(found["attention"]["in_effect"])]:
        assert better["why_not"]
    kernel = found["kernels"]["linear cross-entropy"]
    assert kernel["in_effect"] == ("Triton" if torch.cuda.is_available() else "PyTorch")
    assert (kernel["why"] is None) == torch.cuda.is_available()
    code, out, _ = run(capfd, "doctor")
    assert code == 0
    assert found["attention"]["in_effect"] in out


def test_run_passes_arguments_on_and_patches_trl(place, capfd):
    (place / "script.py").write_text(
        "import sys\nfrom trl import SFTTrainer\nprint(SFTTrainer.__module__, sys.argv[1:], __name__)\nsys.exit(7)\n"
    )
    code, out, _ = run(capfd, "run", "script.py", "--lr", "1", "-m", "x", "--help")
    assert code == 7
    assert out == "truetune.train.trainer ['--lr', '1', '-m', 'x', '--help'] __main__\n"


# -- a run's beginning ------------------------------------------------------------------------------------------------


def test_weights_are_read_ahead_where_they_will_be_loaded(place, capfd, monkeypatch):
    asked = []
    monkeypatch.setattr("truetune.cli.read_ahead", lambda *words: asked.append(words))
    run(capfd, *TRAIN, "--dry-run", "revision=v1")
    assert asked == []
    run(capfd, *TRAIN, "adapter=./none", "revision=v1")
    run(capfd, "check", *TRAIN[1:5])
    assert asked == [("llama", "v1"), ("llama", "main")]


def test_what_imports_made_is_no_garbage_while_a_command_works(place, capfd, monkeypatch):
    import gc

    frozen = []
    monkeypatch.setattr("truetune.run.train", lambda *_, **__: frozen.append(gc.get_freeze_count()) or sys.exit(0))
    run(capfd, *TRAIN)
    assert frozen[0] > 100_000
    assert gc.isenabled() and gc.get_freeze_count() == 0
