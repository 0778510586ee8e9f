"""Files of rows: sound ones that bring what they must train, sound ones in which something changed, and wild ones."""

import copy
import csv
import gzip
import io
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from truetune.data.shapes import ROLES

from .cases import is_text, nested, numbers, scalars, texts, values

END = "<|im_end|>"

# -- sound rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A row as a file has it, and what is trained of it with ChatML."""

    row: dict[str, Any]
    text: str
    answers: list[str]
    prompt: str | None = None  # of raw text, which no template renders


clean = texts.filter(is_text)
_NAMES = {"user": ["human", "user"], "assistant": ["gpt", "assistant", "model"], "system": ["system"]}
_ORDERS = "ua ua ua uaua suaua uaa uuau ausa sua sa u a".split()
_SPLIT_ORDERS = "ua uaua suaua uuau sua uaa auua".split()
_SHAPES = "messages messages json sharegpt split prompt alpaca alpaca_history pair text".split()


def chatml(turns: list[tuple[str, str]]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}{END}\n" for role, content in turns)


def up_to_end(content: str) -> str:
    """The answer up to the terminator, which may stand at the end of the content already."""
    text = content + END
    end = len(text.rstrip())
    while text[:end].rstrip().endswith(END):
        end = len(text[:end].rstrip()) - len(END)
    return text[: text.index(END, end) + len(END)]


def _chat(row: dict[str, Any], turns: list[tuple[str, str]], first: int = 0) -> Example:
    """`first`: the turns before it are a prompt. Otherwise what precedes the first question is not trained."""
    asked = first or next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns))
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant" and i >= asked]
    kept = turns[: answers[-1] + 1] if answers else turns
    return Example(row, chatml(kept), [up_to_end(turns[i][1]) for i in answers])


def _raw(row: dict[str, Any], prompt: str, completion: str) -> Example:
    completion = completion if completion.endswith(END) else completion + END
    return Example(row, prompt + completion, [completion], prompt)


@st.composite
def examples(draw, shape: str) -> Example:
    """A conversation or a text, and one of the ways in which data sets write it."""
    if shape == "text":
        text = draw(clean)
        return _raw({"text": text}, "", text)
    if shape == "prompt":
        prompt, completion = draw(clean), draw(clean)
        return _raw({"prompt": prompt, "completion": completion}, prompt, completion)
    if shape == "pair":
        system, question, answer = draw(st.just("") | clean), draw(clean), draw(clean)
        turns = [("system", system)] if system else []
        return _chat(
            {"user": question, "assistant": answer, "system": system},
            [*turns, ("user", question), ("assistant", answer)],
        )
    if shape.startswith("alpaca"):
        history = draw(st.lists(st.tuples(clean, clean), max_size=2)) if shape == "alpaca_history" else []
        instruction, more, output = draw(clean), draw(st.just("") | clean), draw(clean)
        row: dict[str, Any] = {"instruction": instruction, "input": more, "output": output}
        if shape == "alpaca_history":
            row["history"] = [list(pair) for pair in history]
        question = f"{instruction}\n{more}" if instruction and more else instruction or more
        turns = [turn for asked, said in history for turn in (("user", asked), ("assistant", said))]
        return _chat(row, [*turns, ("user", question), ("assistant", output)])
    roles = {"u": "user", "a": "assistant", "s": "system"}
    order = draw(st.sampled_from(_SPLIT_ORDERS if shape == "split" else _ORDERS))
    turns = [(roles[role], draw(clean)) for role in order]
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    if shape == "split":
        cuts = [i for i in range(1, len(order)) if order[i - 1 : i + 1] != "aa"]
        cut = draw(st.sampled_from(cuts))
        return _chat({"prompt": messages[:cut], "completion": messages[cut:]}, turns, cut)
    if shape == "sharegpt":
        named = [{"from": draw(st.sampled_from(_NAMES[role])), "value": content} for role, content in turns]
        return _chat({"conversations": named}, turns)
    return _chat({"messages": json.dumps(messages) if shape == "json" else messages}, turns)


@st.composite
def sound_files(draw) -> tuple[tuple[str, bytes], list[Example]]:
    """A file whose rows have one shape, as somebody's editor, spreadsheet or script may have left it."""
    shape = draw(st.sampled_from(_SHAPES))
    some = draw(st.lists(examples(shape), min_size=1, max_size=3))
    kinds = [".jsonl", ".jsonl", ".json", ".parquet"]
    # A cell of CSV holds text, and what `prompt` holds is not taken for JSON.
    kind = draw(st.sampled_from(kinds if shape == "split" else [*kinds, ".csv"]))
    rows = [example.row for example in some]
    if kind != ".csv" and draw(st.booleans()):
        rows = [{"id": number, "source": "x", **row} for number, row in enumerate(rows)]
    data = written(kind, rows)
    if kind == ".jsonl":
        data = data.replace(b"\n", draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b" \n"])))
        data = data.rstrip(b"\n") if draw(st.booleans()) else data
    if kind == ".json":
        data = draw(st.sampled_from([b"%b", b'{"data": %b}', b'{"version": 1, "data": %b}'])) % data
    if kind != ".parquet":
        data = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + data
        if draw(st.integers(0, 9)) == 0:
            return (f"rows{kind}.gz", gzip.compress(data, 1)), some
    return (f"rows{kind}", data), some


# -- wild rows ---------------------------------------------------------------------------------------------------------

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
                *"tokenize messages tools continue_final_message return_dict chat_template conversation".split(),
                *"add_generation_prompt padding eos_token range class documents tokenizer_kwargs".split(),
                "",
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


# -- sound rows in which something changed -----------------------------------------------------------------------------

_PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
_CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
_TOOL = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
_BESIDE_CONTENT = [
    {"name": "Ada"}, {"weight": 1}, {"weight": 0}, {"reasoning_content": "hm"}, {"thinking": 7}, {"content": _PARTS},
    {"content": None}, {"tool_calls": _CALL}, {"content": None, "tool_calls": _CALL}, {"tool_calls": []},
    {"content": "I add", "tool_calls": _CALL}, {"role": "tool"}, {"role": "developer"}, {"role": "moderator"},
    {"from": "gpt"}, {"value": "other"},
]  # fmt: skip
_BESIDE_MESSAGES = [
    {"system": "Be brief."}, {"system": ""}, {"tools": _TOOL}, {"tools": json.dumps(_TOOL)}, {"tools": []},
    {"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template_kwargs": "{}"}, {"id": 7}, {"text": "other"},
    {"chat_template_kwargs": {"messages": []}}, {"prompt": "other"}, {"output": None},
]  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(list or object, index or key) of everything in `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


@st.composite
def changed_rows(draw) -> list[Any]:
    """Rows of one shape. Most of what changes in them is still data, or was meant to be."""
    shape = draw(st.sampled_from(_SHAPES))
    rows = [example.row for example in draw(st.lists(examples(shape), min_size=1, max_size=3))]
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        row = draw(st.sampled_from(rows))
        messages = [at[key] for at, key in _places(row) if isinstance(at[key], dict)]
        change = draw(st.sampled_from(["row", "message", "message", "message", "value", "gone"]))
        if change == "message" and messages:
            draw(st.sampled_from(messages)).update(copy.deepcopy(draw(st.sampled_from(_BESIDE_CONTENT))))
        elif change == "value" and (places := _places(row)):
            at, key = draw(st.sampled_from(places))
            at[key] = draw(st.one_of(texts, values, tool_calls))
        elif change == "gone" and (places := _places(row)):
            at, key = draw(st.sampled_from(places))
            del at[key]
        else:
            wild = draw(st.fixed_dictionaries({}, optional=beside))
            row.update(copy.deepcopy(draw(st.sampled_from([*_BESIDE_MESSAGES, wild]))))
    return rows


# -- files -------------------------------------------------------------------------------------------------------------


def _jsonl(rows: list) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows)


def _json(value) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def _csv(rows: list) -> bytes:
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


def written(kind: str, rows: list) -> bytes:
    return {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[kind](rows)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A name, and bytes that are that kind of file, or were before something happened to them."""
    kind = draw(st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".json", ".csv", ".parquet"]))
    some = draw(changed_rows()) if draw(st.integers(0, 3)) else draw(st.lists(rows, min_size=1, max_size=3))
    data = written(kind, some)
    if kind == ".json":
        data = draw(st.sampled_from([b"%b", b"%b", b'{"data": %b}', b'{"a": 1, "data": %b}'])) % data
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        change = draw(st.sampled_from(["bom", "crlf", "cut", "bytes", "twice", "junk", "blank"]))
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
