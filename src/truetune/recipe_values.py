"""Text into typed values: YAML whose scalars stay text until the field's type is known.

YAML 1.1 reads `2e-4` as a string and `off` as a boolean, whatever the field. Here a scalar is read by the type of its
field, in a file and on the command line alike.
"""

import dataclasses
import enum
import math
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from truetune.recipe_words import nearest

_NULL = ("", "~", "null", "Null", "NULL")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_INT = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)+")
_MAX_VALUES = 100_000  # a few lines of aliases to aliases stand for billions
_MAX_DEPTH = 50
_LINE_BREAKS = re.compile("[\r\u2028\u2029\ufeff]")
_NO_TEXT = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # what no path, name or template holds


class RecipeError(ValueError):
    """A recipe or a command line that cannot be what was meant; the message is one sentence with the mend."""


class Plain(str):
    """A scalar without quotes: only these can be null, or a number or a boolean where a field takes anything."""


class WrongTypeError(ValueError):
    """A value does not fit its field's type; the message says what would."""


# -- reading -----------------------------------------------------------------------------------------------------------


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a file, its scalars as `Plain` or `str`, and where each key stands: {"lora.r": "a.yaml:7"}.

    Raises `RecipeError` where the file is missing, empty, not UTF-8, not YAML or not a mapping, and where a key is set
    twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}: `truetune init {path}` writes one.") from None
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error.strerror}): give a YAML file.") from None
    root = _compose(text, path)
    if root is None:
        raise RecipeError(f"The recipe {path} is empty: `truetune init` writes a complete one.")
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path} is not a recipe: it must hold `key: value` lines, as `truetune init` writes them.")
    places: dict[str, str] = {}
    return _value(root, "", path, places), places


def read_text(text: str, where: str) -> Any:
    """A value from the command line: `[a, b]` and `{a: 1}` are YAML, all else is the text itself.

    Raises `RecipeError`, naming `where`, for brackets that do not close.
    """
    if text[:1] not in ("[", "{"):
        return Plain(checked_text(text, where))
    return _value(_compose(text, where), "", where, {})


def checked_text(text: str, where: str) -> str:
    """`text`. Raises `RecipeError`, naming `where`, for what is no text: NUL, escape codes, half surrogates."""
    if found := _NO_TEXT.search(text):
        raise RecipeError(f"{where} holds the character {found[0]!a}, which is no text: remove it.")
    return text


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or "unreadable character"
    except RecursionError:
        line, problem = "", "nested too deeply"
    except (ValueError, OverflowError):  # PyYAML lets chr() complain of "\UFFFFFFFF"
        line, problem = "", "an escape that is no character"
    raise RecipeError(f"{where}{line} is not YAML ({problem}): mend this line.")


def _value(node: yaml.Node | None, key: str, where: str, places: dict[str, str]) -> Any:
    return _Values(where, places).read(node, key)


class _Values:
    """The values of YAML nodes, whose keys' places go into `places`; no more of them than a recipe can have."""

    def __init__(self, where: str, places: dict[str, str]) -> None:
        self.where = where
        self.places = places
        self.count = 0

    def read(self, node: yaml.Node | None, key: str, outer: tuple[yaml.Node, ...] = ()) -> Any:
        assert node is not None
        self.count += 1
        if node in outer:
            raise RecipeError(f"{self.where}: `{key}` contains itself: remove the alias.")
        if self.count > _MAX_VALUES or len(outer) > _MAX_DEPTH:
            raise RecipeError(f"{self.where}: `{key}` holds more values than a recipe can have: remove the aliases.")
        self._check_tag(node, key)
        if isinstance(node, yaml.ScalarNode):
            text = checked_text(node.value, f"{self.where}:{node.start_mark.line + 1}: `{key}`")
            return Plain(text) if node.style is None else text
        outer = (*outer, node)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, f"{key}.{i}", outer) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, key, outer)

    def _mapping(self, node: yaml.MappingNode, key: str, outer: tuple[yaml.Node, ...]) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for name_node, value_node in node.value:
            place = f"{self.where}:{name_node.start_mark.line + 1}"
            if not isinstance(name_node, yaml.ScalarNode):
                raise RecipeError(f"{place}: a key must be a word, not a list or a mapping.")
            name = checked_text(name_node.value, f"{place}: a key")
            dotted = f"{key}.{name}" if key else name
            if name in mapping:
                raise RecipeError(f"{place}: `{dotted}` is set twice: keep one.")
            self.places[dotted] = place
            mapping[name] = self.read(value_node, dotted, outer)
        return mapping

    def _check_tag(self, node: yaml.Node, key: str) -> None:
        """A tag such as !env or !!python/name asks for something; to take the text beside it would be a guess."""
        kind = {yaml.ScalarNode: "str", yaml.SequenceNode: "seq", yaml.MappingNode: "map"}[type(node)]
        if node.tag not in (None, "!", f"tag:yaml.org,2002:{kind}"):
            place = f"{self.where}:{node.start_mark.line + 1}"
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise RecipeError(f"{place}: `{key}` has the tag {tag}, and a recipe has no tags: write the plain value.")


class RecipeDumper(yaml.SafeDumper):
    """Quotes text that would be read as something else: `none`, `1e5`, or with line breaks of Unicode."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        as_plain = text.lower() in ("none", *_TRUE, *_FALSE) or text in _NULL or _FLOAT.fullmatch(text)
        style = '"' if as_plain or _LINE_BREAKS.search(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


RecipeDumper.add_representer(str, RecipeDumper.represent_text)


# -- typing ------------------------------------------------------------------------------------------------------------


def convert(value: Any, hint: Any) -> Any:
    """`value` (text, or lists and mappings of text) as the type `hint`. Raises `WrongTypeError`."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _untyped(value)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args)
    if origin is Literal:
        return _convert_literal(value, args)
    if (origin or hint) in (list, tuple):
        item = args[0] if args else Any
        if isinstance(value, str):
            value = [Plain(word.strip()) for word in value.split(",")]
        return [convert(v, item) for v in _must_be(list, value, hint)]
    if (origin or hint) is dict:
        return {k: convert(v, args[1] if args else Any) for k, v in _must_be(dict, value, hint).items()}
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(value, hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _convert_literal(value, tuple(member.value for member in hint))
    return _convert_scalar(value, hint)


def _convert_scalar(value: Any, hint: Any) -> Any:
    text = _must_be(str, value, hint)
    if hint is type(None) and _is_null(text):
        return None
    if hint is str and not _is_null(text):
        return str(text)
    if hint is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if hint in (int, float) and _FLOAT.fullmatch(text):
        number = float(text)
        if math.isfinite(number) and (hint is float or number.is_integer()):
            return number if hint is float else int(text) if _INT.fullmatch(text) else int(number)
    raise WrongTypeError(describe(hint))


def _convert_union(value: Any, members: tuple) -> Any:
    """The first member that fits, the narrowest first, so that `str` takes only what is nothing else."""
    narrow = [m for m in members if m is not str]
    if any(isinstance(m, type) and issubclass(m, enum.Enum) for m in narrow):
        members = tuple(narrow)  # `SchedulerType | str` is the scheduler's name
    words = str in members
    if words and isinstance(value, str):
        if value.lower() in _TRUE[1:] + _FALSE[1:]:
            narrow = [m for m in narrow if m is not bool]  # `include_num_input_tokens_seen: no` is a word
        if not _WORDS.fullmatch(value):
            narrow = [m for m in narrow if (get_origin(m) or m) not in (list, tuple)]
    if not words and isinstance(value, Plain) and value.lower() == "none":
        value = Plain("null")
    failures = []
    for member in sorted(narrow, key=_breadth) + [str] * words:
        try:
            return convert(value, member)
        except WrongTypeError as error:
            failures.append((member, error))
    reasons = [error for member, error in failures if member is not type(None)]
    if len(reasons) == 1:  # may hold a suggestion
        raise reasons[0]
    raise WrongTypeError(describe(Union[members]))  # noqa: UP007


def _breadth(hint: Any) -> int:
    order = (type(None), Literal, bool, int, float, dict, list, tuple)
    kind = get_origin(hint) or hint
    return order.index(kind) if kind in order else len(order)


def _convert_literal(value: Any, choices: tuple) -> Any:
    if isinstance(value, str):
        for choice in choices:
            name = str(choice)
            # PEFT writes a family of words as one: "pissa_niter_[number of iters]".
            if value == name or value.lower() == name.lower() or ("[" in name and value.startswith(name.split("[")[0])):
                return str(value) if "[" in name else choice
    raise WrongTypeError(describe(Literal[choices]) + did_you_mean(str(value), map(str, choices)))


def _convert_dataclass(value: Any, hint: Any) -> Any:
    hints = get_type_hints(hint)
    mapping = _must_be(dict, value, hint)
    if unknown := [name for name in mapping if name not in hints]:
        raise WrongTypeError(f"a mapping without `{unknown[0]}`" + did_you_mean(unknown[0], hints))
    try:
        return hint(**{name: convert(v, hints[name]) for name, v in mapping.items()})
    except (TypeError, ValueError) as error:
        raise WrongTypeError(f"a {hint.__name__} ({error})") from None


def _untyped(value: Any) -> Any:
    """What YAML 1.2 would read, and `2e-4` as a number: for mappings whose values have no type of their own."""
    if isinstance(value, dict):
        return {k: _untyped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_untyped(v) for v in value]
    if not isinstance(value, Plain):
        return value
    if _is_null(value):
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not _FLOAT.fullmatch(value) or not math.isfinite(number := float(value)):
        return str(value)
    return int(value) if _INT.fullmatch(value) else number


def _is_null(value: str) -> bool:
    return isinstance(value, Plain) and value in _NULL


def _must_be(kind: type, value: Any, hint: Any) -> Any:
    if not isinstance(value, kind):
        raise WrongTypeError(describe(hint))
    return value


def describe(hint: Any) -> str:
    """A type in words: "a whole number", "one of a, b or c"."""
    origin, args = get_origin(hint), get_args(hint)
    names = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        list: "a list",
        tuple: "a list",
        type(None): "null",
    }
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(member) for member in sorted(args, key=_breadth, reverse=True)))
    if origin is Literal:
        more = ", ..." if len(args) > 12 else ""
        return f"one of {', '.join(map(str, args[:12]))}{more}" if len(args) > 1 else f"{args[0]}".lower()
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return describe(Literal[tuple(member.value for member in hint)])
    return names.get(origin or hint, "a mapping")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """ " (did you mean `x`?)", or nothing where no choice is near."""
    near = nearest(word, choices)
    return f" (did you mean `{near}`?)" if near else ""
