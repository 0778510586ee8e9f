"""How many cases a fuzz test runs, and what an error has to be like.

The ordinary test run has the same few hundred cases every time; `make fuzz` sets TRUETUNE_FUZZ=20000 and draws new
ones.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from truetune.cli import _mistakes, _one_sentence

_CASES = os.environ.get("TRUETUNE_FUZZ")
fuzzed = settings(
    max_examples=int(_CASES or 250),
    derandomize=_CASES is None,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
Mistake = _mistakes()

# -- values that nobody expects ----------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(), max_size=6),  # half surrogates too
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "null",
            "None",
            "\0",
            "\x1b[2J",
            "\u2028",
            "\ufeff",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            "<think>\n\n</think>\n\n",
            "reply-7f3a",
            "first-question-7f3a",
            "{{ 7 * 7 }}",
            "e\u0301\U0001f468\u200d\U0001f469",
            "word " * 2000,
        ]
    ),
)
numbers = st.one_of(
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from([2**31, 2**63, 10**30, 10**400, -(10**4299), float("nan"), float("inf")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def is_text(value: str) -> bool:
    """Whether no half of a surrogate pair is in it."""
    return value.isascii() or value.encode("utf-8", "replace").decode() == value


def nested(depth: int) -> list:
    """`depth` lists in each other, as nobody's data has."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def assert_one_sentence(error: Exception, about: tuple[str, ...] = ("",)) -> None:
    """What `truetune` prints of it is one line of printable text that a person can take in. It names one of `about`."""
    assert any(name in str(error) for name in about)
    said = _one_sentence(str(error))
    assert said.isprintable()
    assert 10 < len(said) < 1500


def runs_of(tokenizer, document) -> list[str]:
    """The text of each stretch of supervised tokens."""
    runs, run = [], []
    for token, label in zip([*document.input_ids, None], [*document.labels, -100], strict=True):
        if label != -100:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs
