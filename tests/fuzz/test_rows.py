# ruff: noqa: PT017, SIM102
"""Any bytes that call themselves data: rows that are what the file says, or one sentence about the line."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data.chat import COUNTS, Encoder
from truetune.data.rows import Source, read_rows
from truetune.data.shapes import ROLES, Row

from .cases import Mistake, assert_one_sentence, fuzzed, nested, numbers, scalars, texts, values

# -- rows --------------------------------------------------------------------------------------------------------------

roles = st.sampled_from(
    [*ROLES, "human", "gpt", "function_call", "observation", "User", "", "\0", "moderator", None, 7, ["user"]]
)
parts = st.one_of(st.fixed_dictionaries({"type": st.just("text"), "text": texts}), texts, values)
contents = st.one_of(texts, texts, st.lists(parts, max_size=3), values)
arguments = st.one_of(st.dictionaries(texts, values, max_size=2), st.just('{"a": "\\ud800"}'), values)
functions = st.fixed_dictionaries({"name": st.one_of(st.just("add"), scalars)}, optional={"arguments": arguments})
calls = st.one_of(functions, st.fixed_dictionaries({"function": functions}, optional={"id": scalars}), values)
tool_calls = st.one_of(st.lists(calls, max_size=2), calls, functions.map(json.dumps), values)
kwargs = st.one_of(
    st.fixed_dictionaries({"enable_thinking": st.booleans()}),
    st.dictionaries(
        st.sampled_from(
            [
                "tokenize",
                "messages",
                "tools",
                "continue_final_message",
                "return_dict",
                "chat_template",
                "conversation",
                "add_generation_prompt",
                "padding",
                "eos_token",
                "range",
                "",
                "class",
                "documents",
                "tokenizer_kwargs",
            ]
        ),
        values,
        max_size=2,
    ),
    values,
)
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": roles, "content": contents},
        optional={
            "tool_calls": tool_calls,
            "reasoning_content": st.one_of(texts, values),
            "thinking": texts,
            "weight": numbers,
            "name": values,
            "value": texts,
        },
    ),
    st.fixed_dictionaries({"from": roles, "value": contents}, optional={"content": texts, "role": roles}),
    values,
)
plain_turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts})
conversations = st.one_of(st.lists(plain_turns, min_size=1, max_size=6), st.lists(messages, max_size=5), values)
beside = {"system": st.one_of(texts, values), "tools": st.one_of(tool_calls, values), "chat_template_kwargs": kwargs}
rows = st.one_of(
    st.fixed_dictionaries({"messages": conversations}, optional=beside),
    st.fixed_dictionaries({"messages": conversations.map(json.dumps)}, optional=beside),
    st.fixed_dictionaries({"conversations": conversations}, optional=beside),
    st.fixed_dictionaries({"prompt": conversations | texts, "completion": conversations | texts}, optional=beside),
    st.fixed_dictionaries(
        {"instruction": texts | values, "output": texts | values},
        optional={"input": texts | values, "history": st.lists(st.lists(texts, max_size=3), max_size=2) | values},
    ),
    st.fixed_dictionaries({"user": texts | values, "assistant": texts | values}, optional=beside),
    st.fixed_dictionaries({"text": texts | values}),
    st.fixed_dictionaries({"messages": st.sampled_from([50, 90, 400, 3000]).map(nested)}),
    values,
)
column_maps = st.none() | st.dictionaries(
    st.sampled_from(["messages", "prompt", "completion", "text", "user", "assistant", "system", "no"]),
    st.sampled_from(["messages", "prompt", "completion", "text", "question"]) | texts,
    max_size=2,
)


# -- files -------------------------------------------------------------------------------------------------------------


def _jsonl(rows: list) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows)


def _json(value) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def _csv(rows: list) -> bytes:
    import csv

    columns = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(name) for name in columns] if isinstance(row, dict) else [row]
        writer.writerow([cell if isinstance(cell, str) else _json(cell).decode() for cell in cells])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list) -> bytes:
    file = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist([row for row in rows if isinstance(row, dict)]), file)
    except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        return b"PAR1 what parquet cannot hold PAR1"
    return file.getvalue()


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A name, and bytes that are that kind of file, or were before something happened to them."""
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".parquet"]))
    some = draw(st.lists(rows, min_size=1, max_size=3))
    data = {
        ".jsonl": _jsonl,
        ".json": lambda rows: _json(draw(st.sampled_from([rows, {"data": rows}, {"a": 1, "data": rows}]))),
        ".csv": _csv,
        ".parquet": _parquet,
    }[kind](some)
    for change in draw(
        st.lists(st.sampled_from(["bom", "crlf", "cut", "bytes", "twice", "junk", "blank"]), max_size=2)
    ):
        place = draw(st.integers(0, len(data)))
        if change == "bom":
            data = b"\xef\xbb\xbf" + data
        elif change == "crlf":
            data = data.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r"])))
        elif change == "cut":
            data = data[:place]
        elif change == "bytes":
            data = data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 1 :]
        elif change == "twice":
            data = data.replace(b'{"messages"', b'{"messages": 1, "messages"')
        elif change == "junk":
            data += draw(st.sampled_from([b"[" * 2000, b"{}\n", b"null\n", b"NaN\n", b"9" * 5000 + b"\n", b"\0"]))
        else:
            data = b"\n\n" + data
    if kind != ".parquet" and draw(st.integers(0, 9)) == 0:
        return f"rows{kind}.gz", gzip.compress(data, 1)[: draw(st.sampled_from([None, None, -5]))]
    return f"rows{kind}", data


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
        assert_one_sentence(error)
        assert str(directory) in str(error) or "column map" in str(error)
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
    write = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}[kind]
    whole = all(text.isascii() or text.encode("utf-8", "replace").decode() == text for text in strings(chats))
    try:
        found = read(directory, (f"rows{kind}", write(some)))
    except Mistake:
        assert not whole
        return
    assert [row.messages for row in found] == chats


@fuzzed
@given(file=files())
def test_rows_become_documents_whose_labels_are_their_answers(directory, tokenizer, file):
    try:
        found = read(directory, file)
        documents, counts = Encoder(tokenizer).encode(found)
    except Mistake as error:
        assert_one_sentence(error)
        return
    assert set(counts) <= set(COUNTS)
    assert {document.row for document in documents} == set(range(len(found)))
    for document in documents:
        assert_labelled_right(tokenizer, document, found[document.row])


def assert_labelled_right(tokenizer, document, row: Row) -> None:
    """For ChatML, whose rendering never changes as the conversation goes on: one document a row, every answer once."""
    ids, labels = document.input_ids, document.labels
    assert len(ids) == len(labels) and labels[0] == -100
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    if row.messages is None:
        text = row.prompt + row.completion
        assert tokenizer.decode(ids) == (text if row.completion.endswith("<|im_end|>") else text + "<|im_end|>")
        return
    turns = [{**message, "content": message["content"] or ""} for message in row.messages]
    first = row.first_supervised
    prefill = ""
    if first and first < len(turns) and {turns[first - 1]["role"], turns[first]["role"]} == {"assistant"}:
        if not turns[first - 1].get("tool_calls"):
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
        and all(call["function"]["name"] in turn["content"] + "<|im_end|>" for call in turn.get("tool_calls") or ())
    ]
    supervised = [turns[i]["content"].removeprefix(prefill if i == first else "") for i in wanted]
    runs, run = [], []
    for token, label in zip([*ids, None], [*labels, -100], strict=True):
        if label != -100:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    assert runs == [up_to_end(content) for content in supervised]
    kept = turns[: wanted[-1] + 1] if wanted else turns
    whole = tokenizer.apply_chat_template(kept, tokenize=False, **row.template_kwargs)
    assert tokenizer.decode(ids) == whole
    if not any(content[:1].isspace() or not content for content in supervised):
        # Otherwise the whole text joins the prompt's line break and the answer's first letters in one token.
        assert ids == tokenizer.apply_chat_template(kept, **row.template_kwargs)["input_ids"]


def up_to_end(content: str) -> str:
    """The answer up to the terminator, which may stand at the end of the content already."""
    text = content + "<|im_end|>"
    end = len(text.rstrip())
    while text[:end].rstrip().endswith("<|im_end|>"):
        end = len(text[:end].rstrip()) - len("<|im_end|>")
    return text[: text.index("<|im_end|>", end) + len("<|im_end|>")]
