"""Recipes that cannot be: errors that say what to write instead."""

import re
from functools import partial

import pytest

from recipe_texts import error_of, load, load_written
from truetune import recipe_words
from truetune.recipe import RecipeError, load_recipe
from truetune.recipe_schema import KEYS


@pytest.fixture
def written(tmp_path):
    return partial(load_written, tmp_path)


@pytest.mark.parametrize(
    ("word", "ours"),
    [
        ("base_model", "`model`"),
        ("model_name_or_path", "`model`"),
        ("load_in_4bit", "`method: qlora`"),
        ("load_in_8bit", "`method: qlora`"),
        ("sequence_len", "`max_length`"),
        ("cutoff_len", "`max_length`"),
        ("max_seq_length", "`max_length`"),
        ("model_max_length", "`max_length`"),
        ("sample_packing", "`packing`"),
        ("neat_packing", "`packing`"),
        ("micro_batch_size", "`training.per_device_train_batch_size`"),
        ("batch_size", "`training.per_device_train_batch_size`"),
        ("num_epochs", "`training.num_train_epochs`"),
        ("lora_rank", "`lora.r`"),
        ("lora_r", "`lora.r`"),
        ("lora_alpha", "`lora.lora_alpha`"),
        ("lora_dropout", "`lora.lora_dropout`"),
        ("lora_target_modules", "`lora.target_modules`"),
        ("lora_target_linear", "`lora.target_modules: all-linear`"),
        ("val_set_size", "`eval_data`"),
        ("train_on_inputs", "`supervise`"),
        ("warmup_ratio", "`training.warmup_steps`"),
        ("datasets", "`data`"),
        ("dataset_name", "`data`"),
        ("template", "`chat_template`"),
        ("finetuning_type", "`method`"),
        ("lr", "`training.learning_rate`"),
        ("learning_rate", "`training.learning_rate`"),
        ("gradient_accumulation_steps", "`training.gradient_accumulation_steps`"),
        ("bf16", "`precision`"),
        ("flash_attention", "doctor"),
        ("evaluation_strategy", "`training.eval_strategy`"),
        ("eval_strategy", "`training.eval_strategy`"),
        ("max_steps", "`training.max_steps`"),
        ("output", "`output_dir`"),
        ("overwrite_output_dir", "--overwrite"),
        ("seed", "`training.seed`"),
        ("use_rslora", "`lora.use_rslora`"),
        ("Lora-Rank", "`lora.r`"),
        # slips of the finger
        ("modle", "`model`"),
        ("methd", "`method`"),
        ("max_lenght", "`max_length`"),
        ("training.learnin_rate", "`training.learning_rate`"),
        ("training.lr", "`training.learning_rate`"),
        ("training.warmup_ratio", "`training.warmup_steps`"),
        ("training.lora_alpha", "`lora.lora_alpha`"),
        ("lora.rank", "`lora.r`"),
        ("lora.lora_alpah", "`lora.lora_alpha`"),
        ("lora.learning_rate", "`training.learning_rate`"),
        ("data.0.weigth", "`data.0.weight`"),
        ("data.0.field_messages", "`columns`"),
        ("data.0.type", "recognised"),
        ("data.weight", "data.0.weight"),
    ],
)
def test_an_unknown_key_is_answered_with_ours(word, ours):
    message = error_of(load, f"{word}=1")
    assert ours in message
    assert word in message


def test_an_unknown_key_in_a_file_names_its_line(written):
    assert error_of(written, "packing: true\nlora:\n  r: 8\n  rank: 9\n").endswith(
        "recipe.yaml:6: unknown key `lora.rank`: use `lora.r`."
    )


def test_a_wrong_value_from_the_command_line_does_not_blame_the_file(written):
    assert "recipe.yaml:3" in error_of(written, "max_length: abc\n")
    assert "recipe.yaml" not in error_of(written, "max_length: 1024\n", "max_length=abc")


def test_the_words_of_other_tools_lead_to_keys_that_exist():
    import truetune.recipe_schema as module

    sections = {"training": module._training_hints(), "lora": module._lora_hints(), "data": module._SOURCE_HINTS}
    for advice in recipe_words.all_advice():
        for quoted in re.findall(r"`([\w.]+)(?:: [\w-]+)?`", advice):
            section, _, name = quoted.replace(".0.", ".").rpartition(".")
            keys = sections[section] if section else [*KEYS, *module._SOURCE_HINTS]
            assert name in keys, advice
    words = [word for words in recipe_words._WORDS_OF.values() for word in words.split()]
    assert not {word for word in words if words.count(word) > 1}
    assert not set(words) & set(KEYS)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("method=loraa", "`lora`"),
        ("method=4bit", "use qlora"),
        ("precision=bfloat16", "use bf16"),
        ("supervise=assistant", "use responses"),
        ("max_length=abc", "a whole number"),
        ("max_length=1", "at least 2"),
        ("max_length=null", "a whole number"),
        ("packing=maybe", "true or false"),
        ("lora.r=2.5", "a whole number"),
        ("lora.r=0", "at least 1"),
        ("lora.lora_dropout=1", "less than 1"),
        ("lora=3", "a mapping"),
        ("lora.bias=alll", "`all`"),
        ("training.learning_rate=nan", "a number"),
        ("training.learning_rate=fast", "a number"),
        ("training.lr_scheduler_type=cosin", "`cosine`"),
        ("training.optim=adamw", "use adamw_torch_fused"),
        ("training.gradient_accumulation_steps=0", "at least 1"),
        ("training.loss_type=mse", "nll"),
        ("training.eval_strategy=steps", "`eval_data`"),
        ("training.shuffle_dataset=true", "no effect"),
        ("eval_data=1.5", "0.05"),
        ("eval_data=0", "0.05"),
        ("data.0.weight=0", "above 0"),
        ("data.0.weight=much", "a number"),
        ("data.2.path=x", "up to 1"),
        ("model.x=1", "no parts"),
        ("lora.r=[", "is not YAML"),
        ("adapter=lora", "`method: lora`"),
        ("noequals", "KEY=VALUE"),
        ("=1", "KEY=VALUE"),
    ],
)
def test_a_value_that_cannot_be_is_an_error_with_the_mend(override, named):
    assert named in error_of(load, override)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["method=qlora", "precision=bf16"], "nf4"),
        (["method=full", "precision=nf4"], "`method: qlora`"),
        (["precision=fp8", "lora.use_dora=true"], "`lora.use_dora` trains norms"),
        (["method=full", "precision=fp8"], "frozen"),
        (["method=full", "lora.r=8"], "`lora.r`"),
        (["method=full", "adapter=runs/a"], "`adapter`"),
        (["adapter=runs/a", "lora.r=8"], "`lora.r`"),
        (["training.embedding_learning_rate=1e-5"], "`lora.modules_to_save`"),
        (["method=full", "training.loraplus_lr_ratio=16"], "needs LoRA"),
    ],
)
def test_keys_that_contradict_each_other_are_an_error(overrides, named):
    assert named in error_of(load, *overrides)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "is not a recipe"),
        (b"model: m\ndata: [a, b\nlora: {}\n", "recipe.yaml:3 is not YAML"),
        (b"model: m\n\tdata: x\n", "recipe.yaml:2 is not YAML"),
        (b"model: m\n---\ndata: x\n", "is not YAML"),
        (b"model: caf\xe9\n", "UTF-8"),
        (b"model: m\0\n", "is not YAML"),
        (b"model: m\ndata: &x [*x]\n", "contains itself"),
        (b"model: m\ndata: x\n? [a]\n: b\n", "a key must be a word"),
        (b"data: x\n", "There is no model"),
        (b"model: m\n", "There is no data"),
        (b"model: m\ndata: []\n", "There is no data"),
        (b"model: m\ndata: 3\n", "`data` must be a path"),
        (b"model: m\ndata: [{split: train}]\n", "has no path"),
        (b"model: [m]\ndata: x\n", "`model` must be text"),
        (b"model:\ndata: x\n", "`model` must be text"),
        (b"model: m\ndata: x\nlora: [1]\n", "`lora` must be a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error(tmp_path, content, named):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert named in error_of(load_recipe, str(path))


def test_a_missing_recipe_names_the_command_that_writes_one(tmp_path):
    assert "truetune init" in error_of(load_recipe, str(tmp_path / "none.yaml"))
    assert "cannot be read" in error_of(load_recipe, str(tmp_path))


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in error_of(load, f"output_dir={tmp_path / 'file' / 'run'}")
    assert "is a file" in error_of(load, f"output_dir={tmp_path / 'file'}")


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
        "lora: " + "[" * 3000,
        '"\\UFFFFFFFF": 1\n',
        'chat_template: "\\0"\n',
        'chat_template: "\\ud800"\n',
        "revision: !env HOME\n",
        "max_length: 1__0\n",
        "output_dir: ''\n",
        "training: {model_init_kwargs: {offload_folder: /tmp/x}}\n",
    ],
)
def test_a_hostile_recipe_is_refused_in_one_sentence(written, text):
    assert error_of(written, text)


@pytest.mark.parametrize(
    ("name", "key"), [("revision", "revision"), ("trust_remote_code", "training.trust_remote_code")]
)
def test_what_has_a_key_of_its_own_is_no_argument_of_the_model(name, key):
    with pytest.raises(RecipeError, match=rf"model_init_kwargs\.{name}` is set by a key of its own: use `{key}`"):
        load_recipe(None, ["model=builtin:demo", "data=builtin:demo", f"training.model_init_kwargs.{name}=true"])
