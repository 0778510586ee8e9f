"""The recipe: values as the user wrote them, one place for each key, and errors that say what to write instead."""

import dataclasses
import re
from pathlib import Path

import pytest

from truetune import recipe_words
from truetune.recipe import Recipe, RecipeError, load_recipe, recipe_template, with_batch_split
from truetune.recipe_schema import KEYS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
BASE = {"model": "m", "data": "chats.jsonl"}


def load(*overrides, **flags) -> Recipe:
    return load_recipe(None, overrides, BASE | flags)


@pytest.fixture
def written(tmp_path):
    """Writes a recipe, with model and data unless they are there, and loads it."""

    def write_and_load(text, *overrides, **flags) -> Recipe:
        path = tmp_path / "recipe.yaml"
        head = "".join(f"{key}: {value}\n" for key, value in BASE.items() if not re.search(f"^{key}:", text, re.M))
        path.write_text(head + text, encoding="utf-8")
        return load_recipe(str(path), overrides, flags)

    return write_and_load


def error_of(action, *args, **kwargs) -> str:
    with pytest.raises(RecipeError) as caught:
        action(*args, **kwargs)
    return str(caught.value)


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_the_written_template_says_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_template(), encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe(None, flags={"model": "builtin:demo", "data": "builtin:demo"})
    for key in KEYS:
        assert re.search(rf"^{key}:", recipe_template(), re.M), f"the template does not show {key}"


def test_each_method_has_its_learning_rate_and_weights():
    assert [load(method=m).training["learning_rate"] for m in ("lora", "qlora", "full")] == [2e-4, 2e-4, 2e-5]
    assert [load(method=m).precision for m in ("lora", "qlora", "full")] == ["auto", "nf4", "auto"]
    assert load(method="full").lora == {}
    assert load(method="qlora").lora["r"] == 16


def test_our_training_defaults_are_accepted_by_the_config_they_go_to(tmp_path):
    from truetune import SFTConfig

    training = with_batch_split(load("eval_data=0.1"), 1).training
    config = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **training)
    assert config.get_warmup_steps(200) == 10
    assert config.lr_scheduler_type == "cosine"
    assert (config.save_steps, config.save_total_limit, config.logging_steps, config.seed) == (0.2, 2, 1, 42)
    assert (config.eval_strategy, config.eval_steps) == ("steps", 0.2)
    assert config.report_to == []


def test_fused_adamw_steps_on_this_machine():
    import torch

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("max_length", [512, 2048, 3000, 4096, 32768])
def test_a_step_is_four_packs_over_all_processes(num_processes, max_length):
    training = with_batch_split(load(f"max_length={max_length}"), num_processes).training
    per_device = training["per_device_train_batch_size"]
    assert per_device * training["gradient_accumulation_steps"] * num_processes == 4
    assert per_device == 1 or per_device * max_length <= 8192
    assert training["per_device_eval_batch_size"] == per_device


def test_a_batch_size_that_was_set_stays():
    training = with_batch_split(load("training.per_device_train_batch_size=2"), 1).training
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (2, 2)
    training = with_batch_split(load("training.gradient_accumulation_steps=16"), 2).training
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == (1, 16)


def test_evaluation_comes_with_the_checkpoints():
    assert "eval_strategy" not in load().training
    assert load("eval_data=0.1", "training.save_strategy=epoch").training["eval_strategy"] == "epoch"
    assert load("eval_data=0.1", "training.save_steps=50").training["eval_steps"] == 50
    assert load("eval_data=0.1", "training.eval_strategy=epoch").training["eval_strategy"] == "epoch"


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "0.0002", ".0002", "'2e-4'"])
def test_2e_4_is_a_number_in_every_place(written, text):
    assert written(f"training:\n  learning_rate: {text}\n").training["learning_rate"] == 2e-4
    assert written(f"training: {{adam_epsilon: {text}}}\n").training["adam_epsilon"] == 2e-4
    assert load(f"training.learning_rate={text.strip(chr(39))}").training["learning_rate"] == 2e-4
    mapping = written(f"training: {{lr_scheduler_kwargs: {{min_lr: {text.strip(chr(39))}}}}}\n")
    assert mapping.training["lr_scheduler_kwargs"] == {"min_lr": 2e-4}


def test_off_is_a_word_where_the_field_takes_words_and_false_where_it_takes_a_boolean(written):
    recipe = written("training: {run_name: off, bf16: off, include_num_input_tokens_seen: no}\npacking: no\n")
    assert recipe.training["run_name"] == "off"
    assert recipe.training["bf16"] is False
    assert recipe.training["include_num_input_tokens_seen"] == "no"
    assert recipe.packing is False
    assert load("training.eval_strategy=no").training["eval_strategy"] == "no"
    assert load("training.report_to=none").training["report_to"] == "none"


@pytest.mark.parametrize("null", ["null", "~", "none", ""])
def test_null_is_written_in_each_usual_way(written, null):
    assert written(f"adapter: {null}\neval_data: {null}\n").adapter is None
    assert load(f"chat_template={null}").chat_template is None


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("lora.r=32", "lora", "r", 32),
        ("lora.target_modules=q_proj,v_proj", "lora", "target_modules", ["q_proj", "v_proj"]),
        ("lora.target_modules=[q_proj, v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
        (r"lora.target_modules=.*layers\.\d{1,2}\..*", "lora", "target_modules", r".*layers\.\d{1,2}\..*"),
        ("lora.modules_to_save=lm_head", "lora", "modules_to_save", ["lm_head"]),
        ("lora.rank_pattern.model.layers.0.q_proj=8", "lora", "rank_pattern", {"model.layers.0.q_proj": 8}),
        ("lora.init_lora_weights=pissa_niter_4", "lora", "init_lora_weights", "pissa_niter_4"),
        ("lora.init_lora_weights=false", "lora", "init_lora_weights", False),
        ("lora.trainable_token_indices=[1, 2]", "lora", "trainable_token_indices", [1, 2]),
        ("lora.layers_to_transform=3", "lora", "layers_to_transform", 3),
        ("training.max_steps=1e3", "training", "max_steps", 1000),
        ("training.warmup_steps=10", "training", "warmup_steps", 10),
        ("training.optim=sgd", "training", "optim", "sgd"),
        ("training.dataset_num_proc=none", "training", "dataset_num_proc", None),
        ("training.weight_decay=5e-5", "training", "weight_decay", 5e-5),
        ("training.report_to=wandb,tensorboard", "training", "report_to", ["wandb", "tensorboard"]),
        (
            "training.model_init_kwargs={attn_implementation: sdpa}",
            "training",
            "model_init_kwargs",
            {"attn_implementation": "sdpa"},
        ),
    ],
)
def test_a_value_gets_the_type_of_its_field(override, section, name, value):
    found = getattr(load(override), section)[name]
    assert found == value
    assert type(found) is type(value) or isinstance(found, float)


def test_every_training_and_lora_field_takes_its_own_default():
    """A field whose type cannot be read would refuse every value."""
    from peft import LoraConfig

    from truetune import SFTConfig

    def written_as(value):
        if isinstance(value, bool) or value is None:
            return {True: "true", False: "false", None: "null"}[value]
        return str(getattr(value, "value", value))

    for section, config, hints in (("training", SFTConfig, "_training_hints"), ("lora", LoraConfig, "_lora_hints")):
        import truetune.recipe_schema as module

        names = set(getattr(module, hints)()) - set(module._OWN_KEY) - set(module._WITHOUT_EFFECT)
        defaults = {f.name: f.default for f in dataclasses.fields(config) if f.name in names}
        for name, default in defaults.items():
            if default is dataclasses.MISSING or name in ("logging_dir", "debug", "hub_token"):
                continue
            if (section, name) == ("training", "eval_strategy"):
                continue
            value = getattr(load(f"{section}.{name}={written_as(default)}"), section)[name]
            assert value == default, name


def test_the_effective_recipe_reads_back_as_itself(written):
    recipe = written(
        "method: qlora\nlora: {r: 8, target_modules: [q_proj], init_lora_weights: no, eva_config: {rho: 2}}\n"
        "data: [{path: a.jsonl, weight: 2, columns: {prompt: question}}, b.jsonl]\neval_data: held.jsonl\n"
        "training: {run_name: 'null', learning_rate: 1e-9, lr_scheduler_kwargs: {a: [1, 'on', 2e-4]}}\n"
        "allow: [stock_trl]\n"
    )
    assert written(recipe.to_yaml()) == recipe
    assert recipe.training["run_name"] == "null"
    full = load(method="full")
    assert written(full.to_yaml()) == full
    adapted = load("adapter=runs/a")
    assert written(adapted.to_yaml()) == adapted


# -- where a key is set ------------------------------------------------------------------------------------------------


def test_the_command_line_changes_the_file(written):
    text = "lora: {r: 8, lora_alpha: 4}\ntraining: {learning_rate: 1e-3}\ndata: [{path: a.jsonl, weight: 3}, b.jsonl]\n"
    recipe = written(text, "lora.r=2", "training.learning_rate=1e-4", "data.1.weight=2", method="qlora")
    assert (recipe.lora["r"], recipe.lora["lora_alpha"], recipe.method) == (2, 4, "qlora")
    assert recipe.training["learning_rate"] == 1e-4
    assert [(s.path, s.weight) for s in recipe.data] == [("a.jsonl", 3), ("b.jsonl", 2)]


def test_a_whole_key_replaces_the_files(written):
    recipe = written(
        "data: [{path: a.jsonl, columns: {text: body}}]\nlora: {r: 8}\n", "lora={lora_alpha: 1}", data="b.jsonl"
    )
    assert [(s.path, s.columns) for s in recipe.data] == [("b.jsonl", None)]
    assert (recipe.lora["r"], recipe.lora["lora_alpha"]) == (16, 1)


def test_columns_and_a_second_source_from_the_command_line():
    recipe = load("data.0.columns.prompt=question", "data.0.columns.completion=answer", "data.1.path=more.jsonl")
    assert recipe.data[0].columns == {"prompt": "question", "completion": "answer"}
    assert recipe.data[1].path == "more.jsonl"


@pytest.mark.parametrize(
    "override",
    ["method=full", "lora.modules_to_save=[lm_head]", "lora.trainable_token_indices=[1]", "chat_template=chatml"],
)
def test_an_embedding_learning_rate_is_taken_where_embeddings_train(override):
    load("training.embedding_learning_rate=1e-5", override)


@pytest.mark.parametrize("path", RECIPES, ids=[path.name for path in RECIPES])
def test_the_recipes_load_and_name_their_command(path):
    recipe = load_recipe(str(path))
    assert f"truetune train recipes/{path.name}" in path.read_text(encoding="utf-8")
    assert recipe.output_dir.startswith("runs/")


def test_what_the_user_set_is_known():
    recipe = load("packing=true", "lora.r=16", "training.bf16=true")
    assert recipe.explicit == {"model", "data.0.path", "packing", "lora.r", "training.bf16"}


@pytest.mark.parametrize(
    ("text", "overrides", "flags", "named"),
    [
        ("max_length: 1024\nmax_length: 2048\n", [], {}, "recipe.yaml:4: `max_length` is set twice"),
        ("lora:\n  r: 8\n  r: 9\n", [], {}, "recipe.yaml:5: `lora.r` is set twice"),
        ("", ["lora.r=8", "lora.r=9"], {}, "`lora.r` is set twice"),
        ("", ["lora={r: 8}", "lora.r=9"], {}, "`lora.r` is set twice"),
        ("", ["model=b"], {"model": "a"}, "`model` is set twice"),
        ("", ["data.0.path=b"], {"data": "a"}, "`data.0.path` is set twice"),
        ("training: {max_length: 1024}\n", [], {}, "use `max_length`"),
        ("training: {assistant_only_loss: true}\n", [], {}, "use `supervise`"),
        ("training: {padding_free: true}\n", [], {}, "use `packing`"),
        ("", ["training.resume_from_checkpoint=x"], {}, "use --resume"),
    ],
)
def test_a_key_set_in_two_places_is_an_error(written, text, overrides, flags, named):
    assert named in error_of(written, text, *overrides, **flags)


# -- errors that help --------------------------------------------------------------------------------------------------


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


def test_reading_a_recipe_without_training_fields_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from truetune.recipe import load_recipe; load_recipe(None, [], {'model': 'm', 'data': 'd'});"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_tilde_is_the_home_directory_where_no_shell_has_seen_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    keys = ("model", "adapter", "chat_template", "output_dir")
    recipe = load_recipe(None, [f"{key}=~/{key}" for key in keys] + ["data=~/chats.jsonl"])
    assert [getattr(recipe, key) for key in keys] == [f"/home/ada/{key}" for key in keys]


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


def test_text_that_looks_like_something_else_reads_back_as_itself(written):
    recipe = written("chat_template: 'none'\ntraining: {lr_scheduler_kwargs: {a: '1e5'}}\n")
    assert "'none'" in recipe.to_yaml() or '"none"' in recipe.to_yaml()
    assert '"1e5"' in recipe.to_yaml()


def test_a_source_can_be_added_where_there_was_a_share():
    assert load("eval_data=0.05", "eval_data.0.path=held.jsonl").eval_data[0].path == "held.jsonl"


@pytest.mark.parametrize(
    ("name", "key"), [("revision", "revision"), ("trust_remote_code", "training.trust_remote_code")]
)
def test_what_has_a_key_of_its_own_is_no_argument_of_the_model(name, key):
    with pytest.raises(RecipeError, match=rf"model_init_kwargs\.{name}` is set by a key of its own: use `{key}`"):
        load_recipe(None, ["model=builtin:demo", "data=builtin:demo", f"training.model_init_kwargs.{name}=true"])
