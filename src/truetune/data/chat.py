"""Rows -> documents: token ids and labels, together, in one pass.

What is supervised is decided on text (turns.py). Here the text is tokenized in pieces that end where supervision begins
and ends, so that the ids before an answer are those of the generation prompt, as at inference, and no token is half
supervised. Some tokenizers cannot be given pieces: they put a space in front of a text (Llama 2) or have special tokens
that swallow the white space behind them (Phi). Their documents are tokenized whole, and a token across the beginning of
an answer is left unsupervised.
"""

import hashlib
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from truetune.data.rows import Row
from truetune.data.shapes import ROLES
from truetune.data.templates import template_text
from truetune.data.turns import Segment, TurnRenderer, documents, shared_length

IGNORE_INDEX = -100
# Whose text a token is; a document holds indexes of these. An answer includes the token that ends it. All before it,
# earlier answers that are not trained too, is "prompt": to tell roles apart there would cost a quarter of the whole
# preparation. Where whole conversations are trained, messages have their roles, and "template" is what the chat
# template writes round and between them.
TEXT_ROLES = ("template", *ROLES, "prompt", "completion", "text")
_INDEX = {role: index for index, role in enumerate(TEXT_ROLES)}

# What `Encoder.encode` counts, in words for a report.
COUNTS = {
    "unrolled_conversations": "conversations that the chat template rewrites as they go on, given as several documents",
    "unrolled_documents": "documents that came of them",
    "empty_think_supervised": "turns that train an empty thinking block; chat_template_kwargs "
    '{"enable_thinking": false} in a row puts it into the prompt where the template knows it',
    "boundary_merged": "answers whose first letters share a token with the prompt, which is not supervised",
    "eos_appended": "turns that the chat template ends with no token, ended with EOS",
    "turns_without_end": "turns that nothing ends: the chat template has no token for it, the tokenizer no EOS",
    "opening_turns_unsupervised": "assistant turns that nobody has asked for, not supervised",
    "empty_answers": "turns without content, which train the model to say nothing",
    "turns_ignored": "assistant turns that the chat template leaves out",
    "tool_calls_ignored": "turns not supervised because the chat template leaves out their tool calls",
    "thinking_ignored": "turns trained without their reasoning, which the chat template leaves out",
    "tools_ignored": "rows whose tools the chat template leaves out",
    "tool_ignored": "rows whose tool messages the chat template leaves out",
    "system_ignored": "rows whose system messages the chat template leaves out",
    "developer_ignored": "rows whose developer messages the chat template leaves out",
}


Tokenized = tuple[list[int], list[int], bytes]  # ids, labels, roles
FirstToken = Callable[[int], tuple[int, bool]]


@dataclass(slots=True)
class Document:
    """One sequence: `labels` aligned with `input_ids`, -100 where not supervised, always at 0; `row` it comes from, and
    that row's `source`; `roles`: an index into `TEXT_ROLES` a token."""

    input_ids: list[int]
    labels: list[int]
    row: int
    source: int = 0
    roles: bytes = b""


class Encoder:
    """Turns rows into documents.

    chat_template: the name of a built-in template, the path of a `.jinja` file, template text, or the name of one of
        the tokenizer's own; None takes the tokenizer's own.
    supervise: "responses" all assistant turns from `row.first_supervised` on, each in exactly one document, exactly as
        it is at inference; "last_response" the last of them; "all" every token but a document's first.
    Raises `DataError` for an unknown template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None = None,
        supervise: Literal["responses", "last_response", "all"] = "responses",
    ) -> None:
        own = tokenizer.chat_template
        if chat_template is not None:
            named = isinstance(own, dict) and chat_template in own
            chat_template = own[chat_template] if named else template_text(chat_template)
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.supervise = supervise
        self._bos = self._own_bos()
        # Where an answer begins, a model that generates begins a new token.
        self._in_pieces = all(
            self._ids(a + b) == self._ids(a) + self._ids(b) for a, b in (("\n", "x"), ("x", " y"))
        ) and not any(token.rstrip for token in tokenizer.added_tokens_decoder.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what decides the documents: the tokenizer, the chat template and `supervise`."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content = tokenizer.backend_tokenizer.to_str()
        else:
            content = json.dumps([type(tokenizer).__name__, tokenizer.get_vocab(), repr(tokenizer.init_kwargs)])
        template = self.chat_template or tokenizer.chat_template
        settings = json.dumps([template, tokenizer.special_tokens_map, self.supervise], sort_keys=True, default=str)
        return hashlib.sha256(f"{content}\0{settings}".encode()).hexdigest()

    @cached_property
    def _turns(self) -> TurnRenderer:
        return TurnRenderer(self.tokenizer, self.chat_template)

    def encode(self, rows: Sequence[Row], first_row: int = 0) -> tuple[list[Document], Counter[str]]:
        """Documents of `rows`, of which the first is number `first_row`, and counts by the names of `COUNTS`.

        Nothing is truncated, and a row with nothing to supervise gives a document without labels. Raises `DataError`
        for a conversation that the chat template refuses, and where there is none.
        """
        counts: Counter[str] = Counter()
        texts: list[list[list[Segment]]] = [[] for _ in rows]
        for number, row in enumerate(rows):
            if row.messages is None:
                texts[number] = [self._raw_text(row)]
        chats = [number for number, row in enumerate(rows) if row.messages is not None]
        if chats:
            for number, rendered in zip(chats, self._chats([rows[number] for number in chats], counts), strict=True):
                texts[number] = rendered
        tokenize = self._tokenized_in_pieces if self._in_pieces else self._tokenized_whole
        tokenized = tokenize([segments for row_texts in texts for segments in row_texts], counts)
        origins = [first_row + number for number, row_texts in enumerate(texts) for _ in row_texts]
        result = []
        for (ids, labels, roles), origin in zip(tokenized, origins, strict=True):
            if self._bos and ids[:1] != self._bos:
                ids, labels, roles = [*self._bos, *ids], [IGNORE_INDEX, *labels], b"\0" + roles
            labels[:1] = [IGNORE_INDEX] * len(labels[:1])  # none, where a template writes nothing
            result.append(Document(ids, labels, origin, rows[origin - first_row].source, roles))
        return result, +counts

    # ---- text and what of it is supervised ---------------------------------------------------------------------------

    def _chats(self, rows: Sequence[Row], counts: Counter[str]) -> list[list[list[Segment]]]:
        if self.supervise == "all":
            return [[[segment]] for segment in self._turns.whole(rows, supervised=True)]
        result = [documents(turns) for turns in self._turns.turns(rows, self.supervise == "last_response", counts)]
        for row_documents in result:
            if len(row_documents) > 1:
                counts["unrolled_conversations"] += 1
                counts["unrolled_documents"] += len(row_documents)
        empty = [number for number, row_documents in enumerate(result) if not row_documents]
        wholes = self._turns.whole([rows[number] for number in empty], supervised=False)
        for number, segment in zip(empty, wholes, strict=True):
            result[number] = [[segment]]
        return result

    def _raw_text(self, row: Row) -> list[Segment]:
        eos = self.tokenizer.eos_token or ""
        completion = row.completion if row.completion.endswith(eos) else row.completion + eos
        if not row.prompt:
            return [Segment(completion, True, "text")]
        return [Segment(row.prompt, self.supervise == "all", "prompt"), Segment(completion, True, "completion")]

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def _tokenized_in_pieces(self, batch: Sequence[Sequence[Segment]], counts: Counter[str]) -> list[Tokenized]:
        pieces = iter(self._pieces([segment for segments in batch for segment in segments]))
        result = []
        for segments in batch:
            ids: list[int] = []
            labels: list[int] = []
            roles = b""
            for segment, (piece, piece_roles) in zip(segments, pieces, strict=False):
                ids += piece
                labels += piece if segment.supervised else [IGNORE_INDEX] * len(piece)
                roles += piece_roles
            result.append((ids, labels, roles))
        return result

    def _pieces(self, segments: Sequence[Segment]) -> list[tuple[list[int], bytes]]:
        """Ids and roles of each; only where several roles are trained are the places of the tokens asked for."""
        mixed = [segment for segment in segments if segment.messages]
        located = iter(self._batch_located([segment.text for segment in mixed]))
        plain = iter(self._batch_ids([segment.text for segment in segments if not segment.messages]))
        result = []
        for segment in segments:
            if segment.messages:
                ids, first_token = next(located)
                roles = bytearray(len(ids))
                _mark_messages(roles, segment, 0, first_token)
            else:
                ids = next(plain)
                roles = bytearray([_INDEX[segment.role or "template"]]) * len(ids)
            result.append((ids, bytes(roles)))
        return result

    def _tokenized_whole(self, batch: Sequence[Sequence[Segment]], counts: Counter[str]) -> list[Tokenized]:
        result = []
        for segments in batch:
            ids, first_token = self._located("".join(segment.text for segment in segments))
            labels = [IGNORE_INDEX] * len(ids)
            roles = bytearray(len(ids))
            end = 0
            for segment in segments:
                start, end = end, end + len(segment.text)
                _mark_messages(roles, segment, start, first_token)
                if segment.role:
                    _mark(roles, segment.role, start, end, first_token)
                if segment.supervised and segment.text:
                    (first, crossed), (last, _) = first_token(start), first_token(end)
                    labels[first:last] = ids[first:last]
                    counts["boundary_merged"] += crossed
            result.append((ids, labels, bytes(roles)))
        return result

    def _batch_located(self, texts: Sequence[str]) -> list[tuple[list[int], FirstToken]]:
        if not self.tokenizer.is_fast:
            return [self._located(text) for text in texts]
        encodings = self._backend().encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, _by_offsets(encoding.offsets)) for encoding in encodings]

    def _located(self, text: str) -> tuple[list[int], FirstToken]:
        """The ids of `text`, and for a place in it the first token from there and whether the one before crosses it."""
        if self.tokenizer.is_fast:
            encoding = self._backend().encode(text, add_special_tokens=False)
            return encoding.ids, _by_offsets(encoding.offsets)
        ids = self._ids(text)

        def first_token_slowly(place: int) -> tuple[int, bool]:
            before = self._ids(text[:place])
            shared = shared_length(before, ids)
            return shared + (shared < len(before)), shared < len(before)

        return ids, first_token_slowly

    def _batch_ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.tokenizer.is_fast:
            return [self._ids(text) for text in texts]
        return [encoding.ids for encoding in self._backend().encode_batch_fast(texts, add_special_tokens=False)]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _backend(self) -> Any:
        """The fast tokenizer without what earlier calls may have left in it."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return backend

    def _own_bos(self) -> list[int]:
        """The BOS that the tokenizer puts before a plain text, if it does."""
        bos = self.tokenizer.bos_token_id
        puts_it = bos is not None and self.tokenizer.encode("x")[:1] == [bos] != self._ids("x")[:1]
        return [bos] if puts_it else []


def _by_offsets(offsets: list[tuple[int, int]]) -> FirstToken:
    def first_token(place: int) -> tuple[int, bool]:
        first = bisect_left(offsets, place, key=itemgetter(0))
        return first, first > 0 and offsets[first - 1][1] > place

    return first_token


def _mark_messages(roles: bytearray, segment: Segment, offset: int, first_token: FirstToken) -> None:
    """`segment` begins at `offset`. A message is found by its content, which templates strip."""
    place = 0
    for message in segment.messages:
        content = str(message["content"]).strip()
        start = _find(content, segment.text, place) if content else -1
        if start >= 0:
            place = start + len(content)
            _mark(roles, message["role"], offset + start, offset + place, first_token)


def _find(content: str, text: str, place: int) -> int:
    """Where `content` stands from `place` on, or -1; rather as a word of its own, because an answer "a" is also a part
    of the template's "<|im_start|>"."""
    first = start = text.find(content, place)
    while start >= 0:
        around = text[max(0, start - 1) : start] + text[start + len(content) : start + len(content) + 1]
        if not any(map(str.isalnum, around)):
            return start
        start = text.find(content, start + 1)
    return first


def _mark(roles: bytearray, role: str, start: int, end: int, first_token: FirstToken) -> None:
    """Tokens that stand across an edge of the text are its own."""
    (first, crossed), (last, _) = first_token(start), first_token(end)
    first -= crossed
    roles[first:last] = bytes([_INDEX[role]]) * (last - first)
