"""Any text that calls itself a recipe, and any KEY=VALUE: a recipe that reads back as itself, or one sentence."""

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from truetune.recipe import Recipe, load_recipe
from truetune.recipe_schema import KEYS, _lora_hints, _training_hints

from .cases import Mistake, assert_one_sentence, fuzzed, scalars, texts, values

# -- recipes -----------------------------------------------------------------------------------------------------------

words = st.sampled_from(
    [
        *"yes no on off Yes NO true True false ~ null Null none None nan .nan .inf -.inf".split(),
        *"0x1F 0o17 012 1_000 1__0 _1 1_ 1e5 2e-4 1e999 .5 5. 1:30 12e03 2001-01-01".split(),
        *"= << * & ! % @ ` | > - ? : # {} [] [a, b] {a: 1} q_proj,v_proj".split(" "),
        "9" * 400,
        "9" * 5000,
        "-0",
        "+1",
        "٣",
        "1.0",
        "lora",
        "full",
        "qlora",
        "nf4",
        "steps",
        "epoch",
        "cosine",
        "../../etc",
        "/etc/passwd",
        "~",
        "~root/x",
        "a" * 300,
        "a/" * 3000,
        "builtin:demo",
        "0.1",
        "64",
        "[[[[",
        "- a",
    ]
)
plausible = st.one_of(
    words, scalars.filter(lambda value: not isinstance(value, str) or len(value) < 100), st.lists(words, max_size=3)
)
leaves = st.one_of(plausible, plausible, values)
training_keys = st.sampled_from(sorted(_training_hints()))
lora_keys = st.sampled_from(sorted(_lora_hints()))
odd_keys = st.one_of(st.sampled_from([*KEYS, "lr", "bf16", "lora_r", "learning_rate", "<<", "путь", "a.b"]), texts)
sources = st.one_of(
    st.fixed_dictionaries(
        {"path": plausible},
        optional={
            "split": plausible,
            "weight": plausible,
            "columns": st.dictionaries(odd_keys, plausible, max_size=2),
            "revision": plausible,
            "name": plausible,
        },
    ),
    st.dictionaries(odd_keys, leaves, max_size=2),
    leaves,
)
data = st.one_of(st.just("chats.jsonl"), st.lists(sources, max_size=3), sources)
valid = {
    "method": st.sampled_from(["lora", "full", "qlora"]),
    "precision": st.sampled_from(["auto", "bf16", "nf4", "fp8"]),
    "max_length": st.integers(0, 5000),
    "training": st.dictionaries(
        st.sampled_from(["learning_rate", "num_train_epochs", "warmup_steps", "seed", "run_name", "weight_decay"]),
        plausible,
        max_size=2,
    ),
    "lora": st.fixed_dictionaries({}, optional={"r": st.integers(0, 99), "rank_pattern": values}),
    "chat_template": texts,
    "output_dir": texts | words,
    "streaming": st.booleans(),
    "packing": words,
    "eval_data": data | st.floats(),
    "data": data,
}
mutated = {
    **dict.fromkeys(KEYS, leaves),
    "training": st.dictionaries(training_keys | odd_keys, leaves, max_size=3) | leaves,
    "lora": st.dictionaries(lora_keys | odd_keys, leaves, max_size=3) | leaves,
}


@st.composite
def trees(draw) -> dict:
    """The keys of a recipe: model and data, some as they should be, some as nobody would have them."""
    tree = {"model": "Qwen/Qwen3-0.6B", "data": "chats.jsonl"}
    for name in draw(st.lists(st.sampled_from(sorted(valid)), max_size=4, unique=True)):
        tree[name] = draw(valid[name])
    for name in draw(st.lists(st.sampled_from(sorted(mutated)), max_size=1)):
        tree[name] = draw(mutated[name])
    if draw(st.integers(0, 9)) == 0:
        tree[draw(odd_keys)] = draw(leaves)
    return tree


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


_INSERTED = [
    "\t",
    "\0",
    "\x07",
    "\x85",
    "\ufeff",
    "&a ",
    "*a ",
    "!!python/object/apply:os.system ",
    "!env ",
    "!!binary ",
    "!<x> ",
    "? ",
    "- ",
    "[",
    "}",
    "'",
    '"',
    '"\\0"',
    '"\\UFFFFFFFF"',
    '"\\ud800"',
    "%YAML 9.9\n",
    "---\n",
    "...\n",
    "&a [*a]",
    "|\n",
    "<<: ",
    "x: 1\nx: 2\n",
    "[" * 3000,
    "{a: " * 60 + "1" + "}" * 60,
    "training: " + "[" * 200 + "]" * 200 + "\n",
    bomb(12),
]


@st.composite
def recipes(draw) -> bytes:
    tree = draw(trees())
    dump = draw(st.sampled_from([yaml.safe_dump, _in_flow, _by_hand, _by_hand]))
    text = dump(tree)
    for _ in range(draw(st.integers(0, 4)) // 3):
        place = draw(st.integers(0, len(text)))
        text = text[:place] + draw(st.sampled_from(_INSERTED) | texts) + text[place + draw(st.integers(0, 2)) :]
    return text.encode("utf-8", draw(st.sampled_from(["surrogatepass", "replace"])))


def _in_flow(tree: dict) -> str:
    return yaml.safe_dump(tree, default_flow_style=True, allow_unicode=True)


def _by_hand(tree, indent: str = "") -> str:
    """Block YAML as people write it, words without quotes, whatever they then mean."""
    lines = ""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            lines += f"{indent}{name}:\n{_by_hand(value, indent + '  ')}"
        else:
            as_it_is = isinstance(value, str) and value.isprintable()
            lines += f"{indent}{name}: {value if as_it_is else _flow(value)}\n"
    return lines


dotted = st.sampled_from(
    [
        "model",
        "data",
        "eval_data",
        "data.0.weight",
        "data.0.columns",
        "data.1.path",
        "data.x",
        "data.99999999",
        "lora.r",
        "data.0.columns.a.b",
        "lora",
        "training",
        "training.learning_rate",
        "training.lr_scheduler_kwargs.a.b",
        "lora..r",
        "training.model_init_kwargs.x",
        "output_dir",
        "lora.rank_pattern.x.y",
        "eval_data.0.path",
        "data.-1",
        "data.²",
        "data." + "9" * 5000,
        "lr",
        "a.b",
        ".",
        "",
        "--model",
        "training.run_name",
        "max_length.x",
    ]
)
overrides = st.lists(
    st.one_of(
        st.tuples(dotted, words | texts | st.sampled_from(_INSERTED)).map("=".join),
        st.tuples(dotted, values).map(lambda pair: f"{pair[0]}={_flow(pair[1])}"),
        texts,
    ),
    max_size=2,
).filter(lambda some: len(some) != 1 or "=" in some[0])


def _flow(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def assert_reads_back(recipe: Recipe, directory: Path) -> None:
    """What a run leaves in its directory is the recipe that it ran."""
    path = directory / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(str(path))
    assert _comparable(again) == _comparable(recipe)


def _comparable(recipe: Recipe):
    return repr(recipe.to_dict())  # nan is itself


@fuzzed
@given(content=recipes(), overrides=st.just([]) | overrides)
def test_a_recipe_is_read_and_reads_back_or_is_refused_in_one_sentence(directory, content, overrides):
    path = directory / "recipe.yaml"
    path.write_bytes(content)
    before = sorted(os.listdir(directory))
    try:
        recipe = load_recipe(str(path), overrides)
    except Mistake as error:
        assert_one_sentence(error)
        return
    assert sorted(os.listdir(directory)) == before
    assert_reads_back(recipe, directory)
    assert recipe.model and recipe.output_dir
    for text in (recipe.model, recipe.output_dir, *(source.path for source in recipe.data)):
        assert "\0" not in text
        os.fsencode(text)


@fuzzed
@given(overrides=overrides)
def test_the_command_line_alone_is_read_or_refused_in_one_sentence(directory, overrides):
    try:
        recipe = load_recipe(None, overrides, {"model": "Qwen/Qwen3-0.6B", "data": "chats.jsonl"})
    except Mistake as error:
        assert_one_sentence(error)
        return
    assert_reads_back(recipe, directory)
