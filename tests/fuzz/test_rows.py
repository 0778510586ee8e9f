"""Any bytes that call themselves data: rows that are what the file says, or one sentence about the line."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.chat import COUNTS, Encoder
from truetune.data.rows import Source, read_rows
from truetune.data.shapes import ROLES, Row

from .cases import Mistake, assert_one_sentence, fuzzed, is_text, runs_of
from .row_files import END, Example, column_maps, files, plain_turns, sound_files, up_to_end, written


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


def read(directory: Path, file: tuple[str, bytes], columns: dict | None = None) -> list[Row]:
    path = directory / file[0]
    path.write_bytes(file[1])
    return read_rows([Source(str(path), columns=columns)]).rows


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def assert_well_formed(row: Row) -> None:
    """What everything behind the reader takes for granted."""
    for text in strings([row.messages, row.prompt, row.completion, row.tools, row.template_kwargs]):
        text.encode("utf-8")
    assert isinstance(row.prompt, str) and isinstance(row.completion, str)
    if row.messages is None:
        assert not row.tools and not row.template_kwargs
        return
    assert 0 <= row.first_supervised <= len(row.messages) > 0
    for message in row.messages:
        assert message["role"] in ROLES
        assert isinstance(message["content"], str) or (message["content"] is None and message["tool_calls"])
        for call in message.get("tool_calls") or ():
            assert isinstance(call["function"]["name"], str) and "arguments" in call["function"]
    for tool in row.tools or ():
        assert isinstance(tool["function"]["name"], str)
    assert isinstance(row.template_kwargs, dict)


@fuzzed
@given(file=files(), columns=column_maps)
def test_a_file_gives_rows_that_everything_behind_takes_or_one_sentence(directory, file, columns):
    try:
        found = read(directory, file, columns)
    except Mistake as error:
        assert_one_sentence(error, about=(str(directory), "column map"))
        return
    assert found
    for row in found:
        assert_well_formed(row)
        assert row.origin.startswith(f"{directory / file[0]}:")


@fuzzed
@given(
    chats=st.lists(st.lists(plain_turns, min_size=1, max_size=6), min_size=1, max_size=4),
    kind=st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_what_is_well_formed_is_read_as_it_stands(directory, chats, kind):
    some = [{"messages": chat} for chat in chats]
    try:
        found = read(directory, (f"rows{kind}", written(kind, some)))
    except Mistake:
        assert not all(map(is_text, strings(chats)))
        return
    assert [row.messages for row in found] == chats


@fuzzed
@given(written=sound_files())
def test_what_data_sets_hold_in_any_shape_trains_its_answers_and_nothing_else(directory, tokenizer, written):
    file, examples = written
    documents, _ = Encoder(tokenizer).encode(read(directory, file))
    for document, example in zip(documents, examples, strict=True):
        assert tokenizer.decode(document.input_ids) == example.text
        assert_supervised(tokenizer, document, example)


def assert_supervised(tokenizer, document, example: Example) -> None:
    if example.prompt is not None:
        prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
        first = max(1, len(prompt))  # nothing comes before a document's first token
        assert document.input_ids[: len(prompt)] == prompt
        assert document.labels == [-100] * first + document.input_ids[first:]
        return
    assert runs_of(tokenizer, document) == example.answers
    assert all(label in (-100, token) for token, label in zip(document.input_ids, document.labels, strict=True))


@pytest.fixture(scope="module")
def reached():
    """How many cases there were, and how many came as far as labels: too few would prove little."""
    counts = Counter()
    yield counts
    assert counts["labels"] >= 0.3 * counts["cases"]


@fuzzed
@given(file=files())
def test_rows_become_documents_whose_labels_are_their_answers(directory, tokenizer, reached, file):
    reached["cases"] += 1
    try:
        found = read(directory, file)
        documents, counts = Encoder(tokenizer).encode(found)
    except Mistake as error:
        assert_one_sentence(error)
        return
    assert set(counts) <= set(COUNTS)
    assert {document.row for document in documents} == set(range(len(found)))
    reached["labels"] += any(label != -100 for document in documents for label in document.labels)
    for document in documents:
        assert_labelled_right(tokenizer, document, found[document.row])


def assert_labelled_right(tokenizer, document, row: Row) -> None:
    """For ChatML, whose rendering never changes as the conversation goes on: one document a row, every answer once."""
    ids, labels = document.input_ids, document.labels
    assert len(ids) == len(labels) and labels[0] == -100
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    if row.messages is None:
        text = row.prompt + row.completion
        assert tokenizer.decode(ids) == (text if row.completion.endswith(END) else text + END)
        return
    turns = [{**message, "content": message["content"] or ""} for message in row.messages]
    first = row.first_supervised
    prefill = ""
    begun = 0 < first < len(turns) and {turns[first - 1]["role"], turns[first]["role"]} == {"assistant"}
    if begun and not turns[first - 1].get("tool_calls"):
        prefill = turns[first - 1]["content"]
        turns[first - 1 : first + 1] = [{**turns[first], "content": prefill + turns[first]["content"]}]
        first -= 1
    opening = 1 if row.first_supervised else next((i for i, t in enumerate(turns) if t["role"] == "user"), len(turns))
    wanted = [
        i
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant"
        and i >= max(first, opening, 1)
        # ChatML leaves out calls; a turn whose text has their names all the same is trained
        and all(call["function"]["name"] in turn["content"] + END for call in turn.get("tool_calls") or ())
    ]
    supervised = [turns[i]["content"].removeprefix(prefill if i == first else "") for i in wanted]
    assert runs_of(tokenizer, document) == [up_to_end(content) for content in supervised]
    kept = turns[: wanted[-1] + 1] if wanted else turns
    whole = tokenizer.apply_chat_template(kept, tokenize=False, **row.template_kwargs)
    assert tokenizer.decode(ids) == whole
    if not any(content[:1].isspace() or not content for content in supervised):
        # Otherwise the whole text joins the prompt's line break and the answer's first letters in one token.
        assert ids == tokenizer.apply_chat_template(kept, **row.template_kwargs)["input_ids"]
