"""The recipe: what one run trains, on what and how. YAML and `KEY=VALUE` in, typed values out.

Unknown keys, wrong types and values that contradict each other are errors here, before a model or data set is opened.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from truetune.recipe_schema import Recipe, check_top_key, typed
from truetune.recipe_values import Plain, RecipeError, WrongTypeError, checked_text, convert, read_text, read_yaml

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_template", "with_batch_split", "write_template"]

PACKS_A_STEP = 4
TOKENS_A_MICRO_BATCH = 8192  # what the default packs of a micro-batch may hold on one device
LORA_DEFAULTS = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LEARNING_RATES = {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5}
TRAINING_DEFAULTS = {
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1 it is a share of the run, as are save_steps and eval_steps
    "optim": "adamw_torch_fused",
    "logging_steps": 1.0,
    "save_strategy": "steps",
    "save_steps": 0.2,
    "save_total_limit": 2,
    "seed": 42,
    "report_to": "none",
}
_RANGES = {  # the lowest value, whether it is itself allowed, and the highest
    "max_length": (2, True, None),
    "training.per_device_train_batch_size": (1, True, None),
    "training.per_device_eval_batch_size": (1, True, None),
    "training.gradient_accumulation_steps": (1, True, None),
    "training.num_train_epochs": (0, False, None),
    "training.learning_rate": (0, True, None),
    "training.embedding_learning_rate": (0, True, None),
    "training.warmup_steps": (0, True, None),
    "training.logging_steps": (0, False, None),
    "training.save_steps": (0, False, None),
    "training.eval_steps": (0, False, None),
    "training.weight_decay": (0, True, None),
    "training.adam_beta1": (0, True, 1),
    "training.adam_beta2": (0, True, 1),
    "training.adam_epsilon": (0, True, None),
    "training.seed": (0, True, 2**32),
    "training.data_seed": (0, True, 2**32),
    "training.dataloader_num_workers": (0, True, None),
    "lora.r": (1, True, None),
    "lora.lora_dropout": (0, True, 1),
}


def load_recipe(
    path: str | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, str | None] | None = None,
    when_named: Callable[[str, str], Any] | None = None,
) -> Recipe:
    """The recipe in a YAML file, changed by `overrides` ("lora.r=32") and `flags` ({"model": "..."}; None: not given).

    A whole key replaces the file's (`data=other.jsonl`), a dotted one changes a part of it (`data.0.weight=2`).
    `when_named` is called with `model` and `revision`, unchecked, before the libraries are imported that say which
    types the other values have. Raises `RecipeError` for what no recipe can be: an unknown key, a wrong type, a key set
    twice, a contradiction.
    """
    tree, places = read_yaml(path) if path is not None else ({}, {})
    for key in tree:
        check_top_key(key, places.get(key, ""))
    for key in ("data", "eval_data"):
        if key in tree:
            tree[key] = _as_sources(tree[key])
    for key, value in _command_line(overrides, flags or {}):
        _set(tree, key, value)
        for place in [p for p in places if p == key or p.startswith(f"{key}.")]:
            del places[place]
    if when_named is not None and isinstance(model := tree.get("model"), str):
        when_named(os.path.expanduser(model), str(tree.get("revision", "main")))
    values = typed(tree, places)
    explicit = frozenset(_leaves("", tree))
    recipe = _with_defaults(values, explicit)
    _check(recipe)
    return recipe


def recipe_template() -> str:
    """A commented recipe that says every default."""
    return resources.files("truetune").joinpath("recipe_template.yaml").read_text(encoding="utf-8")


def write_template(path: Path) -> None:
    """Writes `recipe_template` to a new file. Raises `RecipeError` where there is one already, or none can be."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(recipe_template())
    except FileExistsError:
        raise RecipeError(f"There is a file {path} already: name another, or remove it.") from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be written ({error.strerror}): name a file in another directory.") from None


def with_batch_split(recipe: Recipe, num_processes: int) -> Recipe:
    """`recipe` with its batch sizes, which together make `PACKS_A_STEP` packs a step over all processes.

    A size that the user set stays, and the other follows from it. Without packing the packs are single documents.
    """
    training = recipe.training
    packs = training.get("per_device_train_batch_size")
    steps = training.get("gradient_accumulation_steps")
    if packs is None:
        share = max(1, PACKS_A_STEP // (num_processes * (steps or 1)))
        fitting = max(1, TOKENS_A_MICRO_BATCH // recipe.max_length)
        packs = share if steps else max(n for n in range(1, share + 1) if share % n == 0 and n <= fitting)
    if steps is None:
        steps = max(1, PACKS_A_STEP // (num_processes * packs))
    sizes = {"per_device_train_batch_size": packs, "gradient_accumulation_steps": steps}
    return dataclasses.replace(recipe, training={"per_device_eval_batch_size": packs, **training, **sizes})


# -- the command line --------------------------------------------------------------------------------------------------


def _command_line(overrides: Sequence[str], flags: Mapping[str, str | None]) -> list[tuple[str, Any]]:
    """(dotted key, value) of flags and KEY=VALUE, whole keys before parts of them. Raises where one is set twice."""
    given: list[tuple[str, Any]] = [
        (key, Plain(checked_text(value, key))) for key, value in flags.items() if value is not None
    ]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"`{override}` is neither a recipe nor KEY=VALUE: write lora.r=32, say.")
        given.append((key, read_text(text, key)))
    seen: set[str] = set()
    for key, value in given:
        check_top_key(key.partition(".")[0], "", full=key)
        for leaf in _leaves(key, _as_sources(value) if key in ("data", "eval_data") else value):
            if leaf in seen:
                raise RecipeError(f"`{leaf}` is set twice on the command line: keep one.")
            seen.add(leaf)
    return sorted(given, key=lambda pair: pair[0].count("."))


def _leaves(key: str, value: Any) -> list[str]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for name, v in items for leaf in _leaves(f"{key}.{name}" if key else str(name), v)]
    return [key]


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets `lora.r`, `data.0.weight`, `training.lr_scheduler_kwargs.min_lr_rate` in the untyped recipe."""
    name, *rest = key.split(".")
    if name in ("data", "eval_data"):
        if not rest:
            tree[name] = _as_sources(value)
            return
        sources = tree.setdefault(name, [])
        if not isinstance(sources, list):  # null, or the share of rows to evaluate on
            sources = tree[name] = []
        number = int(rest[0]) if re.fullmatch("[0-9]{1,6}", rest[0]) else None
        if number is None or number > len(sources):
            first = f"{name}.0.{rest[0]}" if number is None else f"a number up to {len(sources)}"
            raise RecipeError(f"`{key}` names no source: write {first}.")
        if number == len(sources):
            sources.append({})
        _set_part(sources[number], rest[1:], key, value)
    elif rest:
        if name not in ("lora", "training"):
            raise RecipeError(f"`{name}` has no parts, so `{key}` cannot be set: write {name}=VALUE.")
        _set_part(tree.setdefault(name, {}), rest, key, value)
    else:
        tree[name] = value


def _set_part(mapping: Any, parts: list[str], key: str, value: Any) -> None:
    """A field, or one key of a field that is a mapping; that key may hold dots, as LoRA's `rank_pattern` wants them."""
    if len(parts) > 1 and isinstance(mapping, dict):
        mapping, parts = mapping.setdefault(parts[0], {}), [".".join(parts[1:])]
    if not isinstance(mapping, dict) or not parts:
        raise RecipeError(f"`{key}` cannot be set: what it is a part of is no mapping.")
    mapping[parts[0]] = value


def _as_sources(value: Any) -> Any:
    """One path, one source or a list of either -> a list of sources; what is neither is left to the type check."""
    if isinstance(value, list):
        return [{"path": v} if isinstance(v, str) else v for v in value]
    if isinstance(value, dict):
        return [value]
    if isinstance(value, str) and not (isinstance(value, Plain) and value.lower() in ("", "~", "null", "none")):
        try:
            convert(value, float)
        except WrongTypeError:
            return [{"path": value}]
    return value


# -- defaults and contradictions ---------------------------------------------------------------------------------------


def _with_defaults(values: dict[str, Any], explicit: frozenset[str]) -> Recipe:
    for key, example in (("model", "--model Qwen/Qwen3-8B"), ("data", "--data chats.jsonl")):
        if not values.get(key):
            raise RecipeError(f"There is no {key}: give `{key}` in the recipe or {example}.")
    for key in ("model", "adapter", "chat_template", "output_dir"):
        if values.get(key) is not None:  # in a file, and behind KEY=, no shell does it
            values[key] = os.path.expanduser(values[key])
    method = values.get("method", "lora")
    if method == "qlora" and values.get("precision", "auto") == "auto":
        values["precision"] = "nf4"
    if method != "full" and values.get("adapter") is None:
        values["lora"] = {**LORA_DEFAULTS, **values.get("lora", {})}
    given = values.get("training", {})
    training = {"learning_rate": LEARNING_RATES[method], **TRAINING_DEFAULTS, **given}
    if training["save_strategy"] != "steps" and "save_steps" not in given:
        del training["save_steps"]
    if values.get("eval_data") is not None:
        # At the checkpoints, so that `load_best_model_at_end` can compare them.
        follows = training["save_strategy"] if training["save_strategy"] in ("steps", "epoch") else "epoch"
        training.setdefault("eval_strategy", follows)
        if training["eval_strategy"] == "steps":
            training.setdefault("eval_steps", training.get("save_steps", TRAINING_DEFAULTS["save_steps"]))
    return Recipe(**{**values, "training": training}, explicit=explicit)


def _check(recipe: Recipe) -> None:
    """What no single key can say: ranges, and keys that contradict each other. Raises `RecipeError`."""
    _check_ranges(recipe)
    lora_set = sorted(key for key in recipe.explicit if key.startswith("lora."))
    if recipe.method == "full" and (lora_set or recipe.adapter is not None):
        what = lora_set[0] if lora_set else "adapter"
        raise RecipeError(
            f"`{what}` needs an adapter, and `method: full` trains none: remove it, or use `method: lora`."
        )
    if recipe.adapter is not None:
        if recipe.adapter in ("lora", "qlora", "dora"):
            raise RecipeError("`adapter` is the path of an adapter to train on: use `method: lora` for a new one.")
        if lora_set:
            raise RecipeError(
                f"`{lora_set[0]}` comes from the adapter {recipe.adapter} itself: remove it or `adapter`."
            )
    if recipe.method == "full" and recipe.precision == "fp8":
        raise RecipeError("weights in FP8 are frozen: use `method: lora`, or another `precision`.")
    if recipe.precision == "fp8" and recipe.lora.get("use_dora"):
        raise RecipeError("`lora.use_dora` trains norms of weights, and those in FP8 are frozen: remove one of them.")
    if recipe.method == "qlora" and recipe.precision != "nf4":
        raise RecipeError(
            f"`method: qlora` has weights in nf4, not {recipe.precision}: remove `precision`, or use `method: lora`."
        )
    if recipe.method == "full" and recipe.precision == "nf4":
        raise RecipeError("4-bit weights cannot be trained whole: use `method: qlora`, or another `precision`.")
    _check_learning_rates(recipe)
    asked = {name: recipe.training.get(name) for name in ("eval_strategy", "eval_steps", "eval_on_start")}
    asked = {name: value for name, value in asked.items() if value and value != "no"}
    if recipe.eval_data is None and asked:
        raise RecipeError(f"`training.{next(iter(asked))}` needs data to evaluate on: set `eval_data`, 0.05 say.")
    if isinstance(recipe.eval_data, float) and not 0 < recipe.eval_data < 1:
        raise RecipeError(f"`eval_data` is a share between 0 and 1, or sources, not {recipe.eval_data:g}: use 0.05.")
    _check_streaming(recipe)
    if (steps := recipe.training.get("max_steps", -1)) < 1 and steps != -1:
        raise RecipeError(f"`training.max_steps` must be at least 1, or -1 for whole epochs, not {steps}.")
    for source in (*recipe.data, *(recipe.eval_data if isinstance(recipe.eval_data, list) else ())):
        if source.weight <= 0:
            raise RecipeError(f"The weight of {source.path} is {source.weight:g}: it must be above 0.")
    _check_output_dir(recipe.output_dir)
    _check_other_paths(recipe)


def _check_streaming(recipe: Recipe) -> None:
    if recipe.streaming and recipe.training.get("max_steps", -1) < 1:
        raise RecipeError("`streaming: true` does not know how long the data is: set `training.max_steps`.")
    if recipe.streaming and isinstance(recipe.eval_data, float):
        raise RecipeError(
            f"`eval_data: {recipe.eval_data:g}` is a share of rows, and `streaming: true` does not know how many there "
            "are: give `eval_data` sources of its own."
        )


def _check_learning_rates(recipe: Recipe) -> None:
    """The part of what the optimizer would refuse that can be seen before a model is loaded."""
    lora, training = recipe.lora, recipe.training
    if recipe.method == "full" and training.get("loraplus_lr_ratio") is not None:
        raise RecipeError("`training.loraplus_lr_ratio` needs LoRA, but `method` is full: remove it, or use lora.")
    no_embedding = lora.get("target_modules") == "all-linear" and recipe.chat_template is None
    no_embedding = no_embedding and not (lora.get("modules_to_save") or lora.get("trainable_token_indices"))
    if no_embedding and training.get("embedding_learning_rate") is not None:
        raise RecipeError(
            "`training.embedding_learning_rate` is set, but no embedding is trained: set `lora.modules_to_save` to "
            "[embed_tokens, lm_head], or remove it."
        )


def _check_ranges(recipe: Recipe) -> None:
    for key, (low, inclusive, high) in _RANGES.items():
        section, _, name = key.rpartition(".")
        value = getattr(recipe, section).get(name) if section else getattr(recipe, name)
        if value is None or ((value > low or (inclusive and value == low)) and (high is None or value < high)):
            continue
        limits = f"{'at least' if inclusive else 'more than'} {low}" + (f" and less than {high}" if high else "")
        raise RecipeError(f"`{key}` must be {limits}, not {value:g}.")


def _check_output_dir(output_dir: str) -> None:
    """Refuses, before anything is loaded, an output that cannot be written."""
    if not output_dir.strip():
        raise RecipeError("`output_dir` is empty: name a directory, as output_dir=runs/a.")
    path = Path(output_dir)
    there = path
    while not os.path.lexists(there) and there != there.parent:  # where Path.exists raises, as for too long a name
        there = there.parent
    if not there.is_dir():
        raise RecipeError(
            f"The output {path} cannot be a directory, because {there} is a file: choose another `output_dir`."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"The output {path} cannot be written: get write permission for {there}, or choose another.")


def _check_other_paths(recipe: Recipe) -> None:
    """A run writes into its output directory alone."""
    given = recipe.training.get("model_init_kwargs")
    for name in ("offload_folder", "cache_dir"):
        if isinstance(given, dict) and name in given:
            raise RecipeError(
                f"`training.model_init_kwargs.{name}` would be written outside `output_dir`: remove it (HF_HOME says "
                "where downloads go)."
            )
    for name in ("revision", "trust_remote_code"):
        if isinstance(given, dict) and name in given:
            key = name if name == "revision" else f"training.{name}"
            raise RecipeError(f"`training.model_init_kwargs.{name}` is set by a key of its own: use `{key}` instead.")
