"""Where a chat template has the assistant speak."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from truetune.data.limits import OutOfTime, limited


def generation_prompt(tokenizer: Any) -> list[int]:
    """What the chat template writes where the assistant is to speak; nothing where it has none."""
    question = [{"role": "user", "content": "x"}]
    try:
        with limited():
            with_it, without = (
                tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=add)
                for add in (True, False)
            )
        words = with_it.removeprefix(without) if with_it.startswith(without) else ""
        words = words.split("<think>")[0].strip()  # earlier turns have none
        return tokenizer.encode(words, add_special_tokens=False) if words else []
    except (Exception, OutOfTime):  # no template, one that wants other messages, or one that never ends
        return []


def places_behind(ids_N: np.ndarray, part: Sequence[int]) -> np.ndarray:
    """Where what stands behind each occurrence of `part` begins."""
    if not part:
        return np.empty(0, np.int64)
    places = np.flatnonzero(ids_N[: max(0, len(ids_N) - len(part) + 1)] == part[0])
    for offset, token in enumerate(part):
        places = places[ids_N[places + offset] == token]
    return places + len(part)
