"""The recipe: values as the user wrote them, and one place for each key."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest

from recipe_texts import error_of, load, load_written
from truetune.recipe import load_recipe, recipe_template, with_batch_split
from truetune.recipe_schema import KEYS

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.fixture
def written(tmp_path):
    return partial(load_written, tmp_path)


# -- defaults ----------------------------------------------------------------------------------------------------------


def test_the_written_template_says_the_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_template(), encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe(None, flags={"model": "builtin:demo", "data": "builtin:demo"})
    for key in KEYS:
        assert re.search(rf"^{key}:", recipe_template(), re.M), f"the template does not show {key}"


def test_the_written_template_lists_every_precision():
    from truetune.models.load import PRECISIONS

    line = next(line for line in recipe_template().splitlines() if line.startswith("precision:"))
    assert line.partition("of the weights: ")[2].split(" | ") == list(PRECISIONS)


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


def test_text_that_looks_like_something_else_reads_back_as_itself(written):
    recipe = written("chat_template: 'none'\ntraining: {lr_scheduler_kwargs: {a: '1e5'}}\n")
    assert "'none'" in recipe.to_yaml() or '"none"' in recipe.to_yaml()
    assert '"1e5"' in recipe.to_yaml()


def test_a_source_can_be_added_where_there_was_a_share():
    assert load("eval_data=0.05", "eval_data.0.path=held.jsonl").eval_data[0].path == "held.jsonl"
