import json

import pytest
from source_files import CHAT, error_of, write_jsonl

from truetune.data.rows import Source, read_rows

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def one_row(tmp_path, row, **source):
    path = write_jsonl(tmp_path / "one.jsonl", [row])
    return read_rows([Source(str(path), **source)]).rows[0]


def test_openai_messages_are_kept_as_they_are(tmp_path):
    row = one_row(tmp_path, {"messages": CHAT, "id": 7})
    assert row.messages == CHAT
    assert row.tools is None
    assert row.template_kwargs == {}
    assert row.first_supervised == 0
    assert row.origin == f"{tmp_path}/one.jsonl:1"


def test_text_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]
    assert (
        one_row(tmp_path, {"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "What is this?"
    )


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_tool_calls_have_their_arguments_as_an_object(tmp_path, arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "1"},
    ]
    row = one_row(tmp_path, {"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]})
    assert row.messages[1] == {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"} | CALL]}
    assert row.messages[2] == messages[2]
    assert row.tools == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"id": "c1", "name": "add", "arguments": '{"a": 1}'}, {"id": "c1"} | CALL),
        ({"function": {"name": "now"}}, {"type": "function", "function": {"name": "now", "arguments": {}}}),
        (
            {"function": {"name": "run", "arguments": "ls -l"}},
            {"type": "function", "function": {"name": "run", "arguments": "ls -l"}},
        ),
    ],
)
def test_bare_and_partial_tool_calls_become_openai_ones(tmp_path, call, expected):
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert one_row(tmp_path, {"messages": [CHAT[0], message]}).messages[1]["tool_calls"] == [expected]


def test_no_tool_calls_are_no_key(tmp_path):
    for empty in ([], None):
        row = one_row(tmp_path, {"messages": [CHAT[0], {"role": "assistant", "content": "Hello", "tool_calls": empty}]})
        assert row.messages[1] == CHAT[1]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_under_both_names_that_templates_read(tmp_path, key):
    message = {"role": "assistant", "content": "4", key: "2 + 2"}
    row = one_row(tmp_path, {"messages": [CHAT[0], message]})
    assert row.messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2", "thinking": "2 + 2"}


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_template_arguments_come_as_objects_or_json(tmp_path, as_text):
    tools, kwargs = [{"name": "add", "parameters": {"type": "object"}}], {"enable_thinking": False}
    if as_text:
        tools, kwargs = json.dumps(tools), json.dumps(kwargs)
    row = one_row(tmp_path, {"messages": CHAT, "tools": tools, "chat_template_kwargs": kwargs})
    assert row.tools == [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    assert row.template_kwargs == {"enable_thinking": False}


def test_nulls_are_missing_but_stay_in_json_arguments(tmp_path):
    call = {"id": None, "function": {"name": "find", "arguments": {"limit": None}}}
    message = {"role": "assistant", "content": None, "reasoning_content": None, "name": None, "tool_calls": [call]}
    row = one_row(tmp_path, {"messages": [CHAT[0], message], "tools": None, "system": None})
    expected = {"type": "function", "function": {"name": "find", "arguments": {"limit": None}}}
    assert row.messages == [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [expected]}]
    assert row.tools is None


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_sharegpt_names_become_roles(tmp_path, column):
    names = ["system", "human", "user", "gpt", "assistant", "chatgpt", "bing", "bard", "model", "tool", "observation"]
    row = one_row(
        tmp_path, {column: [{"from": name, "value": name} for name in [*names, "function_response", "tools"]]}
    )
    assistants, tools = ["assistant"] * 6, ["tool"] * 4
    assert [message["role"] for message in row.messages] == ["system", "user", "user", *assistants, *tools]
    assert [message["content"] for message in row.messages] == [*names, "function_response", "tools"]
    assert all(set(message) == {"role", "content"} for message in row.messages)
    row = one_row(tmp_path, {column: [{"from": "human", "value": "Hi", "name": "Ann", "weight": None}]})
    assert row.messages == [{"role": "user", "content": "Hi", "name": "Ann"}]


def test_sharegpt_function_calls_system_and_tools(tmp_path):
    conversation = [
        {"from": "human", "value": "1 + 1?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
        {"from": "tool_call", "value": '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": "{}"}]'},
        {"from": "gpt", "value": "2"},
    ]
    row = one_row(tmp_path, {"conversations": conversation, "system": "Be brief.", "tools": '[{"name": "add"}]'})
    empty_call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    assert row.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, empty_call]},
        {"role": "assistant", "content": "2"},
    ]
    assert row.tools == [{"type": "function", "function": {"name": "add"}}]


def test_alpaca_becomes_a_chat_of_all_its_columns(tmp_path):
    alpaca = {"instruction": "Add", "input": "1, 2", "output": "3", "system": "Be brief.", "history": [["Hi", "Hello"]]}
    row = one_row(tmp_path, alpaca | {"text": "### Instruction: ..."})
    assert [(message["role"], message["content"]) for message in row.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add\n1, 2"),
        ("assistant", "3"),
    ]
    row = one_row(tmp_path, {"instruction": "Add", "input": "", "output": "3", "system": "", "history": None})
    assert [message["content"] for message in row.messages] == ["Add", "3"]


def test_prompt_and_completion_text_stay_raw_text(tmp_path):
    row = one_row(tmp_path, {"prompt": "1 + 1 =", "completion": " 2"})
    assert (row.messages, row.prompt, row.completion) == (None, "1 + 1 =", " 2")


@pytest.mark.parametrize(("prompt", "completion"), [(CHAT[:1], CHAT[1:]), (CHAT[:1], "Hello"), ("Hi", CHAT[1:])])
def test_prompt_messages_are_never_supervised(tmp_path, prompt, completion):
    row = one_row(tmp_path, {"prompt": prompt, "completion": completion, "system": "Be brief."})
    assert row.messages == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert row.first_supervised == 2


def test_plain_text_has_no_prompt(tmp_path):
    row = one_row(tmp_path, {"text": "Once upon a time", "url": "https://example.org"})
    assert (row.messages, row.prompt, row.completion) == (None, "", "Once upon a time")


def test_the_shape_is_reported_and_rich_columns_win(tmp_path):
    shapes = {
        "messages": {"prompt": "Hi", "messages": CHAT, "text": "Hi"},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}], "text": "Hi"},
        "alpaca": {"instruction": "a", "output": "b", "text": "a b"},
        "prompt + completion": {"prompt": "a", "completion": "b", "text": "ab"},
        "prompt + completion messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
        "text": {"text": "a", "messages": None},
    }
    for name, row in shapes.items():
        path = write_jsonl(tmp_path / "data.jsonl", [row])
        assert read_rows([Source(str(path))]).shapes == {str(path): name}


def test_gsm8k_maps_to_raw_text_and_to_chats(gsm8k_path, gsm8k_rows):
    first = gsm8k_rows[0]
    text = read_rows([Source(str(gsm8k_path), columns={"prompt": "question", "completion": "answer"})])
    assert text.shapes == {str(gsm8k_path): "prompt + completion"}
    assert len(text.rows) == 7473
    assert (text.rows[0].prompt, text.rows[0].completion) == (first["question"], first["answer"])
    chat = read_rows([Source(str(gsm8k_path), columns={"user": "question", "assistant": "answer"})])
    assert chat.shapes == {str(gsm8k_path): "user + assistant"}
    assert [message["content"] for message in chat.rows[0].messages] == [first["question"], first["answer"]]
    assert chat.rows[-1].origin == f"{gsm8k_path}:7473"
    assert chat.fingerprint != text.fingerprint


def test_any_column_can_be_mapped(tmp_path):
    assert one_row(tmp_path, {"dialog": CHAT}, columns={"messages": "dialog"}).messages == CHAT
    assert one_row(tmp_path, {"body": "a", "text": "b"}, columns={"text": "body"}).completion == "a"
    row = one_row(tmp_path, {"q": "a", "output": "b"}, columns={"instruction": "q"})
    assert [message["content"] for message in row.messages] == ["a", "b"]
    row = one_row(
        tmp_path,
        {"system_prompt": "s", "question": "q", "response": "r", "functions": '[{"name": "f"}]'},
        columns={"system": "system_prompt", "user": "question", "assistant": "response", "tools": "functions"},
    )
    assert [message["content"] for message in row.messages] == ["s", "q", "r"]
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


def test_a_map_decides_over_the_columns_that_are_there(tmp_path):
    row = one_row(tmp_path, {"messages": CHAT, "q": "a", "a": "b"}, columns={"prompt": "q", "completion": "a"})
    assert (row.messages, row.prompt, row.completion) == (None, "a", "b")


def test_a_mapped_column_is_not_read_twice(tmp_path):
    row = one_row(tmp_path, {"input": "a", "output": "b"}, columns={"instruction": "input"})
    assert [message["content"] for message in row.messages] == ["a", "b"]


def user(content):
    return [{"role": "user", "content": content}]


BAD_ROWS = {
    "unknown role": (
        {"messages": [{"role": "robot", "content": "a"}]},
        "message 1 has the unknown role 'robot': use one",
    ),
    "unknown sharegpt role": ({"conversations": [{"from": "alien", "value": "a"}]}, "unknown role 'alien'"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 has no role"),
    "message is text": ({"messages": ["Hi"]}, "message 1 is text, not an object"),
    "messages are an object": ({"messages": CHAT[0]}, "`messages` is an object, not a list"),
    "messages are prose": ({"messages": "Hi"}, "`messages` is text that is not JSON"),
    "empty conversation": ({"messages": []}, "the conversation in `messages` is empty"),
    "content is a number": ({"messages": user(4)}, "the content of message 1 is a number, neither text nor text parts"),
    "content is null": ({"messages": [*CHAT, *user(None)]}, "the content of message 3 is null"),
    "an image": (
        {"messages": user([{"type": "image_url", "image_url": "x"}])},
        "a part of the type image_url: only text",
    ),
    "a part without text": ({"messages": user([{"type": "text"}])}, "a text part without text"),
    "tool calls are text": ({"messages": [CHAT[0], CHAT[1] | {"tool_calls": "add"}]}, "is text that is not JSON"),
    "tool calls are a number": (
        {"messages": [CHAT[0], CHAT[1] | {"tool_calls": 3}]},
        "tool calls of message 2 are a number",
    ),
    "a call without name": (
        {"messages": [CHAT[0], CHAT[1] | {"tool_calls": [{"function": {}}]}]},
        "message 2 has a tool call",
    ),
    "a call in prose": ({"conversations": [{"from": "function_call", "value": "add 1"}]}, "is text that is not JSON"),
    "reasoning is a list": (
        {"messages": [CHAT[1] | {"thinking": ["a"]}]},
        "the reasoning of message 1 is a list, not text",
    ),
    "weight 0": (
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0}]},
        "message 2 has the weight 0, which is not supported",
    ),
    "tools are an object": ({"messages": CHAT, "tools": {"name": "add"}}, "`tools` is an object, not a list"),
    "tools without a name": ({"messages": CHAT, "tools": [{"a": 1}]}, "`tools` holds something that is not"),
    "template arguments": (
        {"messages": CHAT, "chat_template_kwargs": [1]},
        "`chat_template_kwargs` is a list, not an object",
    ),
    "two systems": ({"messages": [{"role": "system", "content": "a"}, *CHAT], "system": "b"}, "`system` differs from"),
    "system for raw text": ({"prompt": "a", "completion": "b", "system": "c"}, "`system` needs a chat"),
    "output is a number": ({"instruction": "a", "output": 3}, "`output` is a number, not text"),
    "history of texts": (
        {"instruction": "a", "output": "b", "history": ["c"]},
        "`history` holds something that is not a pair",
    ),
    "text is a list": ({"text": ["a"]}, "`text` is a list, not text"),
    "unknown columns": (
        {"question": "a", "answer": "b"},
        "fits no known shape (columns with a value: question, answer)",
    ),
    "no columns": ({}, "fits no known shape (columns with a value: none)"),
    "only nulls": ({"prompt": "a", "completion": None}, "fits no known shape (columns with a value: prompt)"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, name):
    row, expected = BAD_ROWS[name]
    message = error_of(write_jsonl(tmp_path / "chats.jsonl", [row]))
    assert message.startswith(f"{tmp_path}/chats.jsonl:1: ")
    assert expected in message


def test_a_row_of_another_shape_is_named(tmp_path):
    message = error_of(write_jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT}, {"text": "a"}]))
    assert "a.jsonl:3: the row has no value for `messages`" in message
    message = error_of(
        write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": CHAT, "completion": "b"}])
    )
    assert "b.jsonl:2: `prompt` is a list, not text" in message
    message = error_of(
        write_jsonl(tmp_path / "c.jsonl", [{"prompt": CHAT, "completion": "b"}, {"prompt": "a", "completion": "b"}])
    )
    assert "c.jsonl:2: `prompt` and `completion` are both text" in message


def test_a_wrong_column_map_names_the_nearest_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}])

    def mapped(**columns):
        return error_of(Source(str(path), columns=columns))

    assert "a.jsonl:1: there is no column `questoin` to read prompt from: did you mean question" in mapped(
        prompt="questoin", completion="answer"
    )
    assert "the row has question, answer" in mapped(prompt="xyz", completion="answer")
    assert "question is no name that truetune knows: write prompt: question" in mapped(
        question="prompt", answer="completion"
    )
    assert "promt is no name that truetune knows: the names to map to are assistant, " in mapped(promt="question")
    assert "fits no known shape" in mapped(prompt="question", output="answer")
    assert "a.jsonl:2: there is no column `answer`" in mapped(prompt="question", completion="answer")
