"""Whether the run that lies in a directory is the one that is asked to go on: two run.json are compared.

An optimizer's state and a place in the data mean something only in the run that they came from.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from truetune.train.errors import TrainError

# Parts of run.json and the name that allows a difference. A part that either record lacks is not compared: of a run
# that goes on, the last ones are known only when its weights are loaded.
_PARTS = {
    "recipe": "changed_recipe",
    "plan.packs_a_step": "changed_plan",
    "plan.steps": "changed_plan",
    "processes": "changed_processes",
    "environment.versions": "changed_versions",
    "hashes.data": "changed_data",
    "hashes.eval_data": "changed_data",
    "hashes.pack_order": "changed_data",
    "hashes.chat_template": "changed_template",
    "hashes.weights": "changed_weights",
    "hashes.adapter": "changed_weights",
    "trainable": "changed_trainable",
}
_KEYS_OF_THEIR_OWN = {  # of the recipe, which names what the hashes hold
    "data": "changed_data",
    "eval_data": "changed_data",
    "chat_template": "changed_template",
    "model": "changed_weights",
    "revision": "changed_weights",
    "adapter": "changed_weights",
}
_FREE = ("recipe.output_dir", "recipe.allow")
_WORDS = {
    "hashes.data": "the training data",
    "hashes.eval_data": "the evaluation data",
    "hashes.pack_order": "the order of the packs",
    "hashes.chat_template": "the text of the chat template",
    "hashes.weights": "the weights of the model",
    "hashes.adapter": "the weights of the adapter",
}
_NOT_THERE = object()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """What changed between two records of runs, in words, by the name that allows it."""
    found: dict[str, list[str]] = {}
    for part, name in _PARTS.items():
        values = _at(before, part), _at(now, part)
        if _NOT_THERE in values:
            continue
        for path, was, is_now in _changed(part, *values):
            if path in _FREE:
                continue
            section, _, key = path.partition(".")
            own = _KEYS_OF_THEIR_OWN.get(key.partition(".")[0]) if section == "recipe" else None
            found.setdefault(own or name, []).append(_in_words(path, was, is_now, before, now))
    return found


def check_same_run(output: Path, before: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str]) -> None:
    """Raises `TrainError` that says everything that changed since the run in `output`, and is not allowed."""
    found = {name: changes for name, changes in differences(before, now).items() if name not in allow}
    if found:
        sentences = [
            f"{' and '.join(changes)} (take it back, or accept it with allow: [{name}])"
            for name, changes in found.items()
        ]
        raise TrainError(f"{output} holds another run, to be replaced with --overwrite: {'; '.join(sentences)}.")


def _at(record: Mapping[str, Any], part: str) -> Any:
    value: Any = record
    for key in part.split("."):
        value = value.get(key, _NOT_THERE) if isinstance(value, Mapping) else _NOT_THERE
    return value


def _changed(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, before, now) of every value that two parts do not share."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            yield from _changed(f"{path}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield path, before, now


def _in_words(path: str, was: Any, is_now: Any, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if path in ("hashes.data", "hashes.eval_data"):
        counts = (record.get(path.partition(".")[2]) or {} for record in (before, now))
        was, is_now = (f"{c.get('documents', 'no')} documents of {c.get('tokens', 'no')} tokens" for c in counts)
        return f"{_WORDS[path]} changed, from {was} to {is_now}"
    if path in _WORDS:
        return f"{_WORDS[path]} changed"
    if path.startswith("trainable."):
        name = path.partition(".")[2]
        return f"{name} is trained as {is_now or 'nothing'} and was as {was or 'nothing'}"
    name = path.removeprefix("recipe.").removeprefix("environment.versions.")
    return f"{name} was {was} and is {is_now}"
