"""JSON that may come from anywhere: what is valid, but no text or no data, is told before anything trips over it."""

import json
from typing import Any

MAX_DEPTH = 100  # lists and objects in each other; recursion in templates and hashes ends at some hundreds


def parse_json(text: str) -> Any:
    """Raises `ValueError`, with the reason as a clause, for what is no JSON or cannot be used."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deeper(value, MAX_DEPTH):
        raise ValueError("nested too deeply")
    if has_surrogate_escapes(text) and not is_text(value):
        raise ValueError("half of a \\ud escape, which is no character")
    return value


def is_deeper(value: Any, depth: int) -> bool:
    """Whether more than `depth` lists and objects stand in each other in `value`."""
    level = [value]
    for _ in range(depth + 1):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def has_surrogate_escapes(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def is_text(value: Any) -> bool:
    """Whether all strings in `value` can be encoded: an escape like \\ud83d without its other half is JSON, but no text
    that a tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
