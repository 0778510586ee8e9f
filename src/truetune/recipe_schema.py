"""What a recipe holds: its keys, their types, and what to say about a key that it does not have."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import yaml

from truetune.data.rows import Source
from truetune.recipe_values import Plain, RecipeDumper, RecipeError, WrongTypeError, convert
from truetune.recipe_words import advice, nearest, value_advice


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
    streaming: bool = False
    eval_data: float | list[Source] | None = None
    chat_template: str | None = None
    supervise: Literal["responses", "last_response", "all"] = "responses"
    max_length: int = 2048
    overflow: Literal["truncate", "split"] = "truncate"
    packing: bool = True
    training: dict[str, Any] = field(default_factory=dict)
    preflight: Literal["full", "quick", "off"] = "full"
    output_dir: str = "runs/a"
    allow: list[str] = field(default_factory=list)
    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Every effective value, as `load_recipe` would read it back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "explicit"}
        return as_plain(values)

    def to_yaml(self) -> str:
        return yaml.dump(self.to_dict(), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


KEYS = tuple(f.name for f in dataclasses.fields(Recipe) if f.name != "explicit")
_HINTS = get_type_hints(Recipe)
_SOURCE_HINTS = get_type_hints(Source)

# Fields of SFTConfig that are no `training` keys: the recipe says the same elsewhere, or makes its batches itself.
_OWN_KEY = {
    **{name: f"`{name}`" for name in ("max_length", "packing", "preflight", "output_dir", "allow")},
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
    "accelerator_config": "each process takes packs of its own",
    **dict.fromkeys(("pad_to_multiple_of", "dataloader_drop_last"), "no batch is padded and no pack dropped"),
}


# -- types -------------------------------------------------------------------------------------------------------------


def typed(tree: dict[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """`Recipe`'s arguments from an untyped recipe, whose keys stand at `places` in a file. Raises `RecipeError`."""
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


def check_top_key(name: str, place: str, full: str | None = None) -> None:
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


def is_known(word: str) -> bool:
    """Whether `word` is a recipe's key, or another tool's word for one."""
    return word in KEYS or "." in word or advice(word) is not None


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


def as_plain(value: Any) -> Any:
    """Dataclasses, mappings and lists as YAML has them; of a dataclass only what is not null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {n: as_plain(v) for n, v in given.items() if v is not None}
    if isinstance(value, Mapping):
        return {str(k): as_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(v) for v in value]
    return value
