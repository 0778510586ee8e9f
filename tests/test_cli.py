"""The command line: quick help, the right exit codes, and one sentence for each of a user's mistakes."""

import json
import os
import pickle
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from truetune.cli import main

CHAT = {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, _trained_tokenizer) -> Path:
    """A random Llama of 4 layers' hundred thousand weights, saved with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=_trained_tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    _trained_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Path:
    """A directory, the current one, with a model `llama` and data `chats.jsonl` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(tiny_model)
    write_rows(tmp_path / "chats.jsonl", [CHAT] * 4)
    return tmp_path


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(capfd, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exited:
        main([str(word) for word in argv])
    out, err = capfd.readouterr()
    return exited.value.code, out, err


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
        print_whether_it_fits(recipe, training_arguments(recipe), model, console, memory)
        return console.file.getvalue()

    assert re.fullmatch(r"Memory: keep all 36 layers; predicted peak \d+\.\d GiB of 80\n", said(80))
    assert re.match(r"Warning: this may run out of device memory \(.* of 16\): .*qlora", said(16))
    assert said(16, method="qlora").startswith("Memory: ")


def test_an_adapter_to_go_on_with_is_planned_as_it_was_when_it_was_new(place, capfd):
    adapter_with()(place)
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


# -- a user's mistakes -------------------------------------------------------------------------------------------------

TRAIN = ("train", "--model", "llama", "--data", "chats.jsonl", "--output", "out")


def bad_rows(*rows):
    return lambda place: write_rows(place / "chats.jsonl", list(rows))


def bad_bytes(name: str, content: bytes):
    def write(place):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)

    return write


def changed_model(**files):
    """A copy of the model in which a file is replaced, or is missing where its content is None."""

    def copy(place):
        source = (place / "llama").resolve()
        (place / "llama").unlink()
        (place / "llama").mkdir()
        for path in source.iterdir():
            content = files.get(path.stem, b"keep")
            if content == b"keep":
                (place / "llama" / path.name).symlink_to(path)
            elif content is not None:
                (place / "llama" / path.name).write_bytes(content)

    return copy


class Bomb:
    """Whoever unpickles it makes a directory, which is seen."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


BROUGHT_CODE = b"""import os
os.mkdir("imported")
"""


def pickled_weights(place):
    changed_model(model=None)(place)
    (place / "llama" / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def adapter_with(**changes):
    """An adapter on `llama`, made with r=4, its configuration changed."""

    def before(place: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(place / "llama")
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(place / "adapter")
        file = place / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return before


def pickled_adapter(place):
    (place / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(place / "llama"), "r": 2}
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (place / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


def own_code(place):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    changed_model(config=json.dumps(config).encode())(place)
    (place / "llama" / "own.py").write_bytes(BROUGHT_CODE)


def own_tokenizer_code(place):
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    changed_model(tokenizer=None, tokenizer_config=json.dumps(config).encode())(place)
    (place / "llama" / "own.py").write_bytes(BROUGHT_CODE)


def nothing(place):
    pass


USER = {"role": "user", "content": "Hello"}
NO_RECIPE = [
    ("no recipe", nothing, ["train", "none.yaml"], "truetune init"),
    ("empty recipe", bad_bytes("r.yaml", b""), ["train", "r.yaml"], "is empty"),
    ("broken recipe", bad_bytes("r.yaml", b"model: [a\n"), ["train", "r.yaml"], "r.yaml:2 is not YAML"),
    ("recipe not UTF-8", bad_bytes("r.yaml", b"model: caf\xe9\n"), ["train", "r.yaml"], "UTF-8"),
    ("unknown key in a recipe", bad_bytes("r.yaml", b"base_model: x\n"), ["train", "r.yaml"], "r.yaml:1"),
    ("key twice in a recipe", bad_bytes("r.yaml", b"model: x\nmodel: y\n"), ["train", "r.yaml"], "set twice"),
    ("key twice", nothing, [*TRAIN, "model=x"], "set twice"),
    ("unknown key", nothing, [*TRAIN, "sequence_len=4"], "`max_length`"),
    ("unknown option", nothing, [*TRAIN, "--cutoff-len", "4"], "`max_length`"),
    ("wrong type", nothing, [*TRAIN, "max_length=long"], "a whole number"),
    ("neither", nothing, [*TRAIN, "max_length=9", "stray"], "`stray`"),
    ("no model", nothing, ["train", "--data", "chats.jsonl"], "There is no model"),
    ("no data", nothing, ["train", "--model", "llama"], "There is no data"),
    ("processes", nothing, [*TRAIN, "--num-processes", "0"], "1 or more"),
    ("processes as a word", nothing, [*TRAIN, "--num-processes", "two"], "--num-processes"),
    ("init in no directory", nothing, ["init", "nowhere/r.yaml"], "cannot be written"),
    ("no script", nothing, ["run", "none.py"], "none.py"),
    ("run nothing", nothing, ["run"], "SCRIPT.py"),
    ("inspect without a model", nothing, ["inspect", "--data", "chats.jsonl"], "There is no model"),
    ("batches split again", nothing, [*TRAIN, "training.accelerator_config={split_batches: true}"], "no effect"),
    ("seed below 0", nothing, [*TRAIN, "training.seed=-1"], "`training.seed`"),
    ("no steps", nothing, [*TRAIN, "training.max_steps=0"], "`training.max_steps`"),
    ("workers below 0", nothing, [*TRAIN, "training.dataloader_num_workers=-1"], "`training.dataloader_num_workers`"),
    ("Adam's beta", nothing, [*TRAIN, "training.adam_beta1=2"], "`training.adam_beta1`"),
    ("evaluation of nothing", nothing, [*TRAIN, "training.eval_on_start=true"], "`eval_data`"),
    ("schedule without its floor", nothing, [*TRAIN, "training.lr_scheduler_type=cosine_with_min_lr"], "min_lr_rate"),
    ("schedule's unknown keyword", nothing, [*TRAIN, "training.lr_scheduler_kwargs={foo: 1}"], "foo"),
    ("stream without an end", nothing, [*TRAIN, "streaming=true"], "`training.max_steps`"),
    ("streaming of one source", nothing, [*TRAIN, "data.0.streaming=true"], "at the top of the recipe"),
    ("no embedding trained", nothing, [*TRAIN, "training.embedding_learning_rate=1e-5"], "embedding_learning_rate"),
]
BAD_DATA = [
    ("no file", nothing, [*TRAIN[:3], "--data", "none.jsonl"], "none.jsonl"),
    ("empty file", bad_bytes("chats.jsonl", b""), TRAIN, "empty"),
    ("malformed JSON", bad_bytes("chats.jsonl", json.dumps(CHAT).encode() + b"\n{\n"), TRAIN, "chats.jsonl:2"),
    ("not UTF-8", bad_bytes("chats.jsonl", b'{"text": "caf\xe9"}\n'), TRAIN, "UTF-8"),
    ("unknown role", bad_rows({"messages": [{"role": "wizard", "content": "x"}]}), TRAIN, "wizard"),
    ("empty conversation", bad_rows({"messages": []}), TRAIN, "chats.jsonl:1"),
    ("nothing supervised", bad_rows({"messages": [USER]}), TRAIN, "learn from"),
    (
        "only tool calls that the template leaves out",
        bad_rows({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]}),
        TRAIN,
        "the chat template leaves out their tool calls",
    ),
    ("no shape", bad_rows({"a": 1}), TRAIN, "chats.jsonl:1"),
    ("a row of another shape", bad_rows(CHAT, {"a": 1}), TRAIN, "chats.jsonl:2"),
    ("wrong column map", nothing, [*TRAIN, "data.0.columns={prompt: question}"], "question"),
    (
        "not parquet",
        bad_bytes("x.parquet", b"nothing"),
        ["train", "--model", "llama", "--data", "x.parquet"],
        "x.parquet",
    ),
    ("unknown kind of file", bad_bytes("x.docx", b"PK"), ["train", "--model", "llama", "--data", "x.docx"], "x.docx"),
    ("empty directory", bad_bytes("d/.keep", b""), ["train", "--model", "llama", "--data", "d"], "d"),
    ("eval data missing", nothing, [*TRAIN, "eval_data=held.jsonl"], "held.jsonl"),
    ("eval data leaves nothing", nothing, [*TRAIN, "eval_data=0.5"], "eval_data"),
    ("max_length too small", nothing, [*TRAIN, "max_length=4"], "max_length"),
    ("unknown template", nothing, [*TRAIN, "chat_template=chatlm"], "chatml"),
    ("no template file", nothing, [*TRAIN, "chat_template=none.jinja"], "none.jinja"),
    ("broken template", bad_bytes("t.jinja", b"{% for m in %}"), [*TRAIN, "chat_template=t.jinja"], "Jinja"),
    ("inspect of nothing", nothing, ["inspect", "--model", "llama", "--data", "none.jsonl"], "none.jsonl"),
    ("inspect of no model", nothing, ["inspect", "--model", "./none", "--data", "chats.jsonl"], "none"),
]
BAD_MODEL = [
    ("no model there", nothing, ["train", "--model", "./none", "--data", "chats.jsonl"], "none"),
    ("no such Hub model", nothing, ["train", "--model", "nobody/none", "--data", "chats.jsonl"], "nobody/none"),
    ("a file as model", nothing, ["train", "--model", "chats.jsonl", "--data", "chats.jsonl"], "is a file"),
    ("no config", changed_model(config=None), TRAIN, "config.json"),
    ("unknown model type", changed_model(config=b'{"model_type": "martian"}'), TRAIN, "model type"),
    ("not a causal model", changed_model(config=b'{"model_type": "t5"}'), TRAIN, "t5"),
    ("config no JSON", changed_model(config=b"{"), TRAIN, "config.json"),
    ("no tokenizer", changed_model(tokenizer=None, tokenizer_config=None), TRAIN, "tokenizer"),
    ("no chat template", changed_model(chat_template=None), TRAIN, "chat_template"),
    ("no adapter", nothing, [*TRAIN, "adapter=./none"], "none"),
    ("a pickled adapter", pickled_adapter, [*TRAIN, "adapter=adapter"], "pickled weights, which can run code"),
    ("an adapter for other layers", adapter_with(target_modules=["c_attn"]), [*TRAIN, "adapter=adapter"], "c_attn"),
    ("a damaged adapter", adapter_with(r="x"), [*TRAIN, "adapter=adapter"], "does not fit the recipe's model"),
    ("code of its own", own_code, TRAIN, "training.trust_remote_code: true"),
    ("a tokenizer with code of its own", own_tokenizer_code, TRAIN, "training.trust_remote_code: true"),
]
BAD_OUTPUT = [
    ("output below a file", nothing, [*TRAIN[:5], "--output", "chats.jsonl/out"], "chats.jsonl is a file"),
    ("output is a file", nothing, [*TRAIN[:5], "--output", "chats.jsonl"], "chats.jsonl is a file"),
    ("resume of nothing", nothing, [*TRAIN, "--resume"], "checkpoint"),
    ("resume and overwrite", nothing, [*TRAIN, "--resume", "--overwrite"], "--overwrite"),
]
NOT_HERE = [  # by what the machine lacks
    ("liger_kernel", nothing, [*TRAIN, "training.use_liger_kernel=true"], "pip install liger-kernel"),
    ("a GPU", nothing, [*TRAIN, "training.activation_offloading=true"], "remove it"),
]
has = {"liger_kernel": find_spec("liger_kernel") is not None, "a GPU": Path("/dev/nvidiactl").exists()}
CASES = NO_RECIPE + BAD_DATA + BAD_MODEL + BAD_OUTPUT + [case for case in NOT_HERE if not has[case[0]]]
LATE = [  # what only the weights can tell
    ("broken weights", changed_model(model=b"nothing"), TRAIN, "llama"),
    ("pickled weights", pickled_weights, TRAIN, "use_safetensors: false"),
    ("no package to report with", nothing, [*TRAIN, "training.report_to=mlflow"], "mlflow"),
    ("no such argument of the model", nothing, [*TRAIN, "training.model_init_kwargs={foo: 1}"], "foo"),
    ("no module to save", nothing, [*TRAIN, "lora.modules_to_save=[lm_hed]"], "lm_hed"),
    ("one module too many", nothing, [*TRAIN, "lora.target_modules=[q_proj, w_proj]"], "w_proj"),
    ("a token that is not there", nothing, [*TRAIN, "lora.trainable_token_indices=[99999]"], "99999"),
    ("no module to adapt", nothing, [*TRAIN, "lora.target_modules=[nope]"], "nope"),
]


@pytest.mark.parametrize(("before", "argv", "named"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_mistake_gets_one_sentence_and_exit_code_2_and_writes_nothing(place, capfd, before, argv, named):
    before(place)
    there = sorted(place.rglob("*"))
    code, out, err = run(capfd, *argv)
    assert_one_sentence(err)
    assert code == 2
    assert named in err
    assert out == ""
    assert sorted(place.rglob("*")) == there


@pytest.mark.parametrize(("before", "argv", "named"), [case[1:] for case in LATE], ids=[case[0] for case in LATE])
def test_a_mistake_that_shows_with_the_weights_is_told_the_same_way(place, capfd, before, argv, named):
    before(place)
    there = sorted(place.rglob("*"))
    code, _, err = run(capfd, *argv)
    assert_one_sentence(err[err.rindex("truetune: ") :])
    assert code == 2
    assert named in err
    assert sorted(place.rglob("*")) == there


def assert_one_sentence(err: str) -> None:
    assert err.startswith("truetune: "), err
    assert err.count("\n") == 1, err
    assert err.endswith((".\n", "?\n")), err
    assert not re.search(r"[.!?]['\"`)]? +[A-Z]", err), err
    assert "Traceback" not in err


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


def test_an_output_with_something_in_it_is_left_as_it_is(place, capfd):
    (place / "out").mkdir()
    (place / "out" / "thesis.txt").write_text("mine")
    code, _, err = run(capfd, *TRAIN)
    assert code == 2
    assert_one_sentence(err)
    assert "--overwrite" in err
    assert [path.name for path in (place / "out").iterdir()] == ["thesis.txt"]


def test_a_defect_of_ours_is_not_passed_off_as_a_users_mistake(place, monkeypatch):
    import truetune.recipe

    def fails(*_):
        raise ValueError("not one of ours")

    monkeypatch.setattr(truetune.recipe, "load_recipe", fails)
    with pytest.raises(ValueError, match="not one of ours"):
        main(list(TRAIN))


@pytest.mark.parametrize("argv", [["train", "none.yaml"], [*TRAIN, "--dry-run", "max_length=4"]])
def test_the_installed_command_says_it_the_same_way(place, argv):
    done = subprocess.run([sys.executable, "-m", "truetune", *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert_one_sentence(done.stderr)
