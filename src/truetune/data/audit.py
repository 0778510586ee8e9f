"""What is trained, shown: each document's tokens by supervised or not, and the counts. Needs tokenizer files alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from truetune.data.breakdown import breakdown, in_words
from truetune.data.packing import PackSampler
from truetune.data.prepare import IGNORE_INDEX, Prepared

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

STYLES = {  # by (supervised, special)
    (True, False): "bold green",
    (True, True): "bold black on green",
    (False, False): "dim",
    (False, True): "dim reverse",
}


def inspect_lines(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None, packing: int | None = None
) -> Iterator[dict[str, Any]]:
    """A line for each trained document of the first `rows` trained rows (all by default), then {"summary": {...}}.

    A line has `row`, `input_ids`, `labels`, `text`, and `supervised`: the text of each contiguous run of supervised
    tokens, special tokens included. Of a truncated document, what is trained. `packing`: see `summary`.
    """
    for document in shown(prepared, rows):
        yield {
            "row": document["row"],
            "input_ids": document["input_ids"],
            "labels": document["labels"],
            "text": _decode(tokenizer, document["input_ids"]),
            "supervised": supervised_spans(tokenizer, document["input_ids"], document["labels"]),
        }
    yield {"summary": summary(prepared, packing)}


def shown(prepared: Prepared, rows: int | None = None) -> Iterator[dict[str, Any]]:
    """The documents of the first `rows` trained rows (all by default): `row`, `input_ids` and `labels` of each."""
    seen: set[int] = set()
    for document in prepared.documents:
        seen.add(document["row"])
        if rows is not None and len(seen) > rows:
            return
        yield document


def supervised_spans(tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], labels: Sequence[int]) -> list[str]:
    """The text of each maximal run of tokens whose label is not -100, in order."""
    runs = _runs([label != IGNORE_INDEX for label in labels])
    return [_slice(tokenizer, input_ids, start, end) for supervised, start, end in runs if supervised]


def summary(prepared: Prepared, packing: int | None = None) -> dict[str, Any]:
    """The counts (see `Counts`), the shape of each source, what is trained by source and role (see `breakdown`), and,
    with `packing` tokens a pack, packs and efficiency."""
    result = {**prepared.counts.to_dict(), "shapes": prepared.shapes}
    result |= breakdown(prepared.documents, list(prepared.shapes))
    if packing is not None:
        packs = PackSampler(prepared.lengths, packing)
        result |= {"packs": len(packs), "packing_efficiency": round(packs.efficiency, 6)}
    return result


def render_document(tokenizer: PreTrainedTokenizerBase, document: dict[str, Any]) -> Text:
    """The document's text for a Rich console: supervised tokens in colour, the others dim, special tokens reversed."""
    from rich.text import Text

    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids, labels = document["input_ids"], document["labels"]
    kinds = [(label != IGNORE_INDEX, token in special) for token, label in zip(ids, labels, strict=True)]
    text = Text()
    for kind, start, end in _runs(kinds):
        text.append(_slice(tokenizer, ids, start, end), style=STYLES[kind])
    return text


def render_summary(counts: dict[str, Any]) -> Table:
    """What `summary` returns, as a table for a Rich console."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name, value in counts.items():
        label = name.replace("_", " ")
        if name == "packing_efficiency":
            table.add_row(label, f"{value:.2%}")
        elif name == "lengths":
            table.add_row("tokens a document", "documents")
            most = max(value.values())
            for bounds, count in value.items():
                table.add_row(f"  {bounds}", f"{count:,}", "▇" * round(24 * count / most))
        elif name in ("sources", "roles"):
            for key, shares in value.items():
                table.add_row(f"{name[:-1]}: {key}", f"{shares['supervised']:,} supervised", in_words(shares))
        elif isinstance(value, dict):
            for key, item in value.items():
                table.add_row(f"{label}: {key.replace('_', ' ')}", f"{item:,}" if isinstance(item, int) else str(item))
        else:
            table.add_row(label, f"{value:,}")
    return table


def _runs(values: Sequence[Any]) -> Iterator[tuple[Any, int, int]]:
    """Each run of equal values, with its start and end."""
    start = 0
    for value, run in groupby(values):
        end = start + sum(1 for _ in run)
        yield value, start, end
        start = end


def _slice(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, end: int) -> str:
    """The text of a part as it stands in the whole: decoded alone, SentencePiece's first token would lose its space."""
    before, up_to_end = _decode(tokenizer, ids[:start]), _decode(tokenizer, ids[:end])
    if up_to_end.startswith(before):
        return up_to_end.removeprefix(before)
    return _decode(tokenizer, ids[start:end])  # the part before ends inside a character


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list is returned for a batch alone
    return text
