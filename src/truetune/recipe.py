"""The recipe: what one run trains, on what and how. YAML and `KEY=VALUE` in, typed values out.

Unknown keys, wrong types and values that contradict each other are errors here, before a model or data set is opened.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from truetune.data.rows import Source
from truetune.recipe_values import Plain, RecipeError, WrongTypeError, convert, read_text, read_yaml
from truetune.recipe_words import advice, nearest, value_advice

__all__ = [
    "Recipe",
    "RecipeError",
    "how_to_set",
    "load_recipe",
    "recipe_template",
    "with_batch_split",
    "write_template",
]

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


@dataclass(frozen=True)
class Recipe:
    """One run. `load_recipe` makes it, `truetune init` writes it with a line about each key.

    lora: fields of `peft.LoraConfig`; empty where no new adapter is made.
    training: fields of `SFTConfig`: those set by the user and the command line's defaults.
    explicit: the dotted keys that the user set; what they ask for and cannot get is an error, not a line of the report.
    """

    model: str
    data: list[Source]
    revision: str = "main"
    adapter: str | None = None
    method: Literal["lora", "qlora", "full"] = "lora"
    precision: Literal["auto", "bf16", "fp16", "fp32", "nf4", "fp8"] = "auto"
    lora: dict[str, Any] = field(default_factory=dict)
    eval_data: float | list[Source] | None = None
    chat_template: str | None = None
    supervise: Literal["responses", "last_response", "all"] = "responses"
    max_length: int = 2048
    overflow: Literal["truncate", "split"] = "truncate"
    packing: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    output_dir: str = "runs/a"
    allow: list[str] = field(default_factory=list)
    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Every effective value, as `load_recipe` would read it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "explicit"}
        return _plain(values)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


KEYS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name != "explicit")
_HINTS = get_type_hints(Recipe)
_SOURCE_HINTS = get_type_hints(Source)

# Fields of SFTConfig that are no `training` keys: the recipe says the same elsewhere, or makes its batches itself.
_OWN_KEY = {
    **{name: f"`{name}`" for name in ("max_length", "packing", "output_dir", "allow")},
    "chat_template_path": "`chat_template`",
    "completion_only_loss": "`supervise`",
    "assistant_only_loss": "`supervise`",
    "dataset_text_field": "`data.0.columns`",
    "truncation_mode": "`overflow`",
    "packing_strategy": "`packing`",
    "padding_free": "`packing`",
    "eval_packing": "`packing`",
    "resume_from_checkpoint": "--resume",
}
_WITHOUT_EFFECT = {
    **dict.fromkeys(("eos_token", "pad_token"), "the tokenizer and the chat template decide"),
    **dict.fromkeys(("dataset_kwargs", "remove_unused_columns", "label_names"), "the data is prepared before"),
    **dict.fromkeys(
        ("shuffle_dataset", "train_sampling_strategy", "length_column_name"), "packs are drawn by the seed"
    ),
    **dict.fromkeys(("pad_to_multiple_of", "dataloader_drop_last"), "no batch is padded and no pack dropped"),
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
    "lora.r": (1, True, None),
    "lora.lora_dropout": (0, True, 1),
}


def load_recipe(
    path: str | None = None, overrides: Sequence[str] = (), flags: Mapping[str, str | None] | None = None
) -> Recipe:
    """The recipe in a YAML file, changed by `overrides` ("lora.r=32") and `flags` ({"model": "..."}; None: not given).

    A whole key replaces the file's (`data=other.jsonl`), a dotted one changes a part of it (`data.0.weight=2`). Raises
    `RecipeError` for what no recipe can be: an unknown key, a wrong type, a key set twice, a contradiction.
    """
    tree, places = read_yaml(path) if path is not None else ({}, {})
    for key in tree:
        _check_top_key(key, places.get(key, ""))
    for key in ("data", "eval_data"):
        if key in tree:
            tree[key] = _as_sources(tree[key])
    for key, value in _command_line(overrides, flags or {}):
        _set(tree, key, value)
        for place in [p for p in places if p == key or p.startswith(f"{key}.")]:
            del places[place]
    values = _typed(tree, places)
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
    given: list[tuple[str, Any]] = [(key, Plain(value)) for key, value in flags.items() if value is not None]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"`{override}` is neither a recipe nor KEY=VALUE: write lora.r=32, say.")
        given.append((key, read_text(text, key)))
    seen: set[str] = set()
    for key, value in given:
        _check_top_key(key.partition(".")[0], "", full=key)
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
        count = len(sources) if isinstance(sources, list) else 0
        if not rest[0].isdecimal() or int(rest[0]) > count:
            first = f"{name}.0.{rest[0]}" if not rest[0].isdecimal() else f"a number up to {count}"
            raise RecipeError(f"`{key}` names no source: write {first}.")
        if int(rest[0]) == count:
            sources.append({})
        _set_part(sources[int(rest[0])], rest[1:], key, value)
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


# -- types -------------------------------------------------------------------------------------------------------------


def _typed(tree: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key in ("lora", "training"):
            values[key] = _fields(key, value, _lora_hints if key == "lora" else _training_hints, places)
        elif key in ("data", "eval_data") and isinstance(value, list):
            values[key] = [_source(f"{key}.{i}", source, places) for i, source in enumerate(value)]
        elif key == "data":
            raise RecipeError(f"{_at('data', places)}`data` must be a path or a list of sources, not {_shown(value)}.")
        else:
            if isinstance(value, Plain) and value.lower() == "none":
                value = Plain("null")
            values[key] = _converted(key, value, float | None if key == "eval_data" else _HINTS[key], places)
    return values


def _fields(section: str, value: Any, hints_of: Any, places: dict[str, str]) -> dict[str, Any]:
    if isinstance(value, Plain) and value in ("", "null", "~"):
        return {}
    if not isinstance(value, dict):
        raise RecipeError(f"{_at(section, places)}`{section}` must be a mapping, not {_shown(value)}.")
    values = {}
    for name, field_value in value.items():
        key = f"{section}.{name}"
        if section == "training":
            _check_training_key(name, _at(key, places))
        if name not in (hints := hints_of()):
            raise _unknown(name, section, hints, _at(key, places))
        values[name] = _converted(key, field_value, hints[name], places)
    return values


def _source(key: str, value: Any, places: dict[str, str]) -> Source:
    if not isinstance(value, dict):
        raise RecipeError(f"{_at(key, places)}`{key}` must be a path or a mapping with one, not {_shown(value)}.")
    for name in value:
        if name not in _SOURCE_HINTS:
            raise _unknown(name, key, _SOURCE_HINTS, _at(f"{key}.{name}", places))
    values = {n: _converted(f"{key}.{n}", v, _SOURCE_HINTS[n], places) for n, v in value.items()}
    if "path" not in values:
        raise RecipeError(f"{_at(key, places)}`{key}` has no path: give {key}.path.")
    return Source(**values)


def _converted(key: str, value: Any, hint: Any, places: dict[str, str]) -> Any:
    try:
        return convert(value, hint)
    except WrongTypeError as error:
        word = value_advice(key, value) if isinstance(value, str) else None
        expected, mend = (str(error).partition(" (did")[0], f": use {word}") if word else (str(error), "")
        raise RecipeError(f"{_at(key, places)}`{key}` must be {expected}, not {_shown(value)}{mend}.") from None


@functools.cache
def _training_hints() -> dict[str, Any]:
    from truetune.train.config import SFTConfig

    words = {"loss_type": Literal["nll", "dft"]}  # typed as text
    hints = get_type_hints(SFTConfig)
    return {f.name: words.get(f.name, hints[f.name]) for f in dataclasses.fields(SFTConfig) if f.init}


@functools.cache
def _lora_hints() -> dict[str, Any]:
    from peft import LoraConfig

    hints = get_type_hints(LoraConfig)
    # What names the adapter's kind, base and file is not the user's to set.
    ours = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    return {f.name: hints[f.name] for f in dataclasses.fields(LoraConfig) if f.init and f.name not in ours}


# -- unknown keys ------------------------------------------------------------------------------------------------------


def _check_top_key(name: str, place: str, full: str | None = None) -> None:
    if name not in KEYS:
        raise _unknown(full or name, "", KEYS, f"{place}: " if place else "")


def _check_training_key(name: str, place: str) -> None:
    if name in _OWN_KEY:
        raise RecipeError(f"{place}`training.{name}` is set by a key of its own: use {_OWN_KEY[name]} instead.")
    if name in _WITHOUT_EFFECT:
        raise RecipeError(f"{place}`training.{name}` has no effect here ({_WITHOUT_EFFECT[name]}): remove it.")


def how_to_set(word: str) -> str:
    """How to write on the command line what the user called `word`: the end of a sentence, its full stop included."""
    if word in KEYS or "." in word:
        return f"write {word}=VALUE."
    return _mend(word, "", KEYS)


def _unknown(name: str, section: str, choices: Any, place: str) -> RecipeError:
    shown = f"{section}.{name}" if section else name
    return RecipeError(f"{place}unknown key `{shown}`: {_mend(name, section, choices)}")


def _mend(name: str, section: str, choices: Any) -> str:
    """What to use instead: another tool's word in ours, a slip of the finger, or the key of another section."""
    is_source = section.startswith(("data", "eval_data"))
    bare = name.removeprefix("--").rpartition(".")[2].replace("-", "_")
    if word := advice(bare, source=is_source):
        return f"{word}." if word.startswith("remove") else f"use {word}."
    if near := nearest(bare, choices, cutoff=0.85) or _elsewhere(bare, exactly=True) or nearest(bare, choices):
        return f"did you mean `{section}.{near}`?" if section and near in choices else f"did you mean `{near}`?"
    if near := _elsewhere(bare, exactly=False):
        return f"did you mean `{near}`?"
    if is_source:
        return f"a source has {', '.join(choices)}."
    if section:
        return f"`{section}` takes the fields of {'LoraConfig' if section == 'lora' else 'SFTConfig'}."
    return f"the keys are {', '.join(KEYS)}."


def _elsewhere(name: str, *, exactly: bool) -> str | None:
    """The dotted key that `name` is, or is nearly, in any section."""
    dotted = {n: f"training.{n}" for n in _training_hints() if n not in (*_OWN_KEY, *_WITHOUT_EFFECT)}
    dotted |= {n: f"lora.{n}" for n in _lora_hints()} | {n: n for n in KEYS}
    return dotted.get(name if exactly else nearest(name, dotted) or "")


def _at(key: str, places: dict[str, str]) -> str:
    """ "recipe.yaml:7: " for a key that stands in the file."""
    while key not in places and "." in key:
        key = key.rpartition(".")[0]
    return f"{places[key]}: " if key in places else ""


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    return f"`{value}`" if value else "nothing"


# -- defaults and contradictions ---------------------------------------------------------------------------------------


def _with_defaults(values: dict[str, Any], explicit: frozenset[str]) -> Recipe:
    for key, example in (("model", "--model Qwen/Qwen3-8B"), ("data", "--data chats.jsonl")):
        if not values.get(key):
            raise RecipeError(f"There is no {key}: give `{key}` in the recipe or {example}.")
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
    if recipe.precision == "fp8":
        raise RecipeError("`precision: fp8` is not in this version: use bf16, or `method: qlora` for less memory.")
    if recipe.method == "qlora" and recipe.precision != "nf4":
        raise RecipeError(
            f"`method: qlora` has weights in nf4, not {recipe.precision}: remove `precision`, or use `method: lora`."
        )
    if recipe.method == "full" and recipe.precision == "nf4":
        raise RecipeError("4-bit weights cannot be trained whole: use `method: qlora`, or another `precision`.")
    if recipe.eval_data is None and recipe.training.get("eval_strategy", "no") != "no":
        raise RecipeError("`training.eval_strategy` needs something to evaluate on: set `eval_data`, 0.05 say.")
    if isinstance(recipe.eval_data, float) and not 0 < recipe.eval_data < 1:
        raise RecipeError(f"`eval_data` is a share between 0 and 1, or sources, not {recipe.eval_data:g}: use 0.05.")
    for source in (*recipe.data, *(recipe.eval_data if isinstance(recipe.eval_data, list) else ())):
        if source.weight <= 0:
            raise RecipeError(f"The weight of {source.path} is {source.weight:g}: it must be above 0.")
    _check_output_dir(recipe.output_dir)


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
    path = Path(output_dir)
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise RecipeError(
            f"The output {path} cannot be a directory, because {there} is a file: choose another `output_dir`."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecipeError(f"The output {path} cannot be written: get write permission for {there}, or choose another.")


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and lists as YAML has them; of a dataclass only what is not null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {n: _plain(v) for n, v in given.items() if v is not None}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
