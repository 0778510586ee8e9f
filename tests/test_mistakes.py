"""A user's mistakes: one sentence on stderr, exit code 2, and nothing written."""

import json
import os
import pickle
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from commands import CHAT, TRAIN, run, save_adapter, write_rows
from truetune.cli import main


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
    return lambda place: save_adapter(place, **changes)


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
    ("unknown policy", nothing, [*TRAIN, "training.activation_policy=none"], "use one of auto, keep, lean, offload"),
    (
        "policy without checkpointing",
        nothing,
        [*TRAIN, "training.activation_policy=lean", "training.gradient_checkpointing=false"],
        "gradient_checkpointing=False keeps every activation",
    ),
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
