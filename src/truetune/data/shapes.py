"""A raw row (a dict of columns) -> a `Row`, whatever shape it has.

    shape                          columns                                      becomes
    messages                       messages [, system, tools, kwargs]           messages
    sharegpt                       conversations | conversation [, same]        messages
    prompt + completion            both text                                    raw text: no chat template renders it
    prompt + completion messages   one or both are messages [, same]            messages; the prompt is never supervised
    alpaca                         instruction, output [, input, history, same] messages
    user + assistant               user, assistant [, same]                     messages
    text                           text                                         raw text

"same" is system, tools, chat_template_kwargs. A source has the first shape of this order that its first row has the
values for. Messages may be {"role", "content"} or {"from", "value"} in each of them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from truetune.data.errors import DataError
from truetune.data.json_text import parse_json

RawRow = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_OF = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tools": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles whose text is the call itself, as JSON
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(slots=True)
class Row:
    """One training example: either `messages`, or (`messages` is None) the raw text `prompt` + `completion`.

    messages: [{"role", "content", ...}] with a role of `ROLES`; content is text, or None beside `tool_calls`
        ([{"type": "function", "function": {"name", "arguments": dict}}]; arguments are text if no JSON object);
        reasoning is under both `reasoning_content` and `thinking`, because templates read the one or the other.
    tools: [{"type": "function", "function": {...}}]
    template_kwargs: arguments for the chat template, such as {"enable_thinking": False}
    first_supervised: messages before this index are prompt and never supervised
    origin: file and line ("chats.jsonl:17", counted from 1; the row's number for parquet and Hub data)
    source: number of the source, from 0
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    first_supervised: int = 0
    origin: str = ""
    source: int = 0


@dataclass(frozen=True)
class Shape:
    name: str
    required: tuple[str, ...]
    convert: Callable[[RawRow], Row]
    optional: tuple[str, ...] = ()
    accepts: Callable[[RawRow], bool] = lambda row: True


def recognise(first_row: RawRow, columns: Mapping[str, str]) -> Shape:
    """The shape of a source, from its first row and its column map {our name: theirs}; raises `DataError`."""
    names = {name for shape in SHAPES for name in (*shape.required, *shape.optional)}
    for ours, theirs in columns.items():
        if ours not in names:
            swapped = theirs in names
            mend = f"write {theirs}: {ours}" if swapped else f"the names to map to are {', '.join(sorted(names))}"
            raise DataError(f"the column map has {ours}: {theirs}, but {ours} is no name that truetune knows: {mend}")
    row = _renamed(first_row, columns)
    for shape in SHAPES:
        known = {*shape.required, *shape.optional}
        if known.issuperset(columns) and _has(row, shape.required) and shape.accepts(row):
            return shape
    filled = ", ".join(str(name) for name, value in row.items() if value is not None) or "none"
    raise DataError(
        f"the row fits no known shape (columns with a value: {filled}): it needs messages, "
        "conversations, prompt and completion, instruction and output, or text, or a column map such as "
        "columns: {prompt: question, completion: answer}"
    )


def to_row(raw: RawRow, shape: Shape, columns: Mapping[str, str]) -> Row:
    """Converts one raw row of a source that has `shape`; raises `DataError` (without the place) if it does not fit."""
    row = _renamed(raw, columns) if columns else raw
    for name in shape.required:
        if row.get(name) is None:
            raise DataError(
                f"the row has no value for `{columns.get(name, name)}`, which every row of this source needs "
                f"(its shape is {shape.name}): drop the row, or give rows of another shape as a source of their own"
            )
    return shape.convert(row)


def kind(value: Any) -> str:
    """What a JSON value is, in the words of an error message."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    matches = get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return matches[0] if matches else None


def _has(row: RawRow, columns: Iterable[str]) -> bool:
    return all(row.get(name) is not None for name in columns)


def _renamed(raw: RawRow, columns: Mapping[str, str]) -> RawRow:
    """`raw` under our names. A mapped column no longer stands under its own name: it would be read twice."""
    for ours, theirs in columns.items():
        if theirs not in raw:
            close = nearest(theirs, raw)
            mend = f"did you mean {close}" if close else f"the row has {', '.join(map(str, raw)) or 'no columns'}"
            raise DataError(f"there is no column `{theirs}` to read {ours} from: {mend}")
    moved = columns.values()
    kept = {name: value for name, value in raw.items() if name not in moved}
    return kept | {ours: raw[theirs] for ours, theirs in columns.items()}


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _from_messages(column: str) -> Callable[[RawRow], Row]:
    return lambda row: _chat(_conversation(row[column], column), row)


def _from_prompt_completion_text(row: RawRow) -> Row:
    for name in ("system", "tools", "chat_template_kwargs"):
        if row.get(name):
            raise DataError(
                f"`{name}` needs a chat, but prompt and completion are raw text: map them as chat turns instead, "
                "columns: {user: prompt, assistant: completion}"
            )
    return Row(prompt=_text(row, "prompt"), completion=_text(row, "completion"))


def _from_prompt_completion_messages(row: RawRow) -> Row:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        raise DataError("`prompt` and `completion` are both text, but the first row of this source has messages there")
    head = [_turn("user", prompt)] if isinstance(prompt, str) else _conversation(prompt, "prompt")
    tail = [_turn("assistant", completion)] if isinstance(completion, str) else _conversation(completion, "completion")
    result = _chat(head + tail, row)
    assert result.messages is not None
    result.first_supervised = len(result.messages) - len(tail)
    return result


def _from_alpaca(row: RawRow) -> Row:
    history = _decoded(row.get("history") or [], "history")
    if not isinstance(history, list):
        raise DataError(f"`history` is {kind(history)}, not a list of [question, answer]")
    messages = []
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError("`history` holds something that is not a pair of texts [question, answer]")
        messages += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    instruction = _text(row, "instruction")
    if row.get("input"):
        instruction = "\n".join(filter(None, (instruction, _text(row, "input"))))
    return _chat([*messages, _turn("user", instruction), _turn("assistant", _text(row, "output"))], row)


def _from_user_assistant(row: RawRow) -> Row:
    return _chat([_turn("user", _text(row, "user")), _turn("assistant", _text(row, "assistant"))], row)


def _both_text(row: RawRow) -> bool:
    return isinstance(row["prompt"], str) and isinstance(row["completion"], str)


_CHAT = ("system", "tools", "chat_template_kwargs")
SHAPES = (
    Shape("messages", ("messages",), _from_messages("messages"), _CHAT),
    Shape("sharegpt", ("conversations",), _from_messages("conversations"), _CHAT),
    Shape("sharegpt", ("conversation",), _from_messages("conversation"), _CHAT),
    Shape("prompt + completion", ("prompt", "completion"), _from_prompt_completion_text, _CHAT, _both_text),
    Shape("prompt + completion messages", ("prompt", "completion"), _from_prompt_completion_messages, _CHAT),
    Shape("alpaca", ("instruction", "output"), _from_alpaca, ("input", "history", *_CHAT)),
    Shape("user + assistant", ("user", "assistant"), _from_user_assistant, _CHAT),
    Shape("text", ("text",), lambda row: Row(completion=_text(row, "text"))),
)


# ---- columns and messages --------------------------------------------------------------------------------------------


def _text(row: RawRow, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"`{column}` is {kind(value)}, not text")
    return value


def _decoded(value: Any, column: str) -> Any:
    """A list or object that may be written as JSON text, the only way to have one in a CSV cell."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        raise DataError(f"`{column}` is text that is not JSON") from None


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _chat(messages: list[dict[str, Any]], row: RawRow) -> Row:
    """A row of messages, with what the row's other columns say about it."""
    system, tools, template_kwargs = row.get("system"), row.get("tools"), row.get("chat_template_kwargs")
    if system:
        first = _turn("system", _text(row, "system"))
        if messages[0]["role"] != "system":
            messages = [first, *messages]
        elif messages[0]["content"] != system:
            raise DataError(
                "`system` differs from the system message that the conversation begins with: keep one of them"
            )
    if not tools and not template_kwargs:
        return Row(messages)
    template_kwargs = _decoded(template_kwargs or {}, "chat_template_kwargs")
    if not isinstance(template_kwargs, dict):
        raise DataError(f"`chat_template_kwargs` is {kind(template_kwargs)}, not an object")
    return Row(messages, tools=_tools(tools), template_kwargs=template_kwargs)


def _tools(value: Any) -> list[dict[str, Any]] | None:
    tools = _decoded(value or [], "tools")
    if not isinstance(tools, list):
        raise DataError(f"`tools` is {kind(tools)}, not a list of functions")
    tools = [_decoded(tool, "tools") for tool in tools]
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError('`tools` holds something that is not {"type": "function", "function": {"name", ...}}')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def _conversation(value: Any, column: str) -> list[dict[str, Any]]:
    messages = _decoded(value, column) if column not in ("prompt", "completion") else value
    if not isinstance(messages, list):
        raise DataError(f"`{column}` is {kind(messages)}, not a list of messages")
    if not messages:
        raise DataError(f"the conversation in `{column}` is empty: drop the row")
    return [_message(message, number) for number, message in enumerate(messages, 1)]


def _message(item: Any, number: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"message {number} is {kind(item)}, not an object with role and content")
    role_key, content_key = ("from", "value") if item.get("role") is None and "from" in item else ("role", "content")
    name, content = item.get(role_key), item.get(content_key)
    role = _ROLE_OF.get(name) if isinstance(name, str) else None
    if role is None:
        given = f"the unknown role {name!r}" if name is not None else "no role"
        raise DataError(f"message {number} has {given}: use one of {', '.join(ROLES)}")
    if content is not None and content_key == "value" and item.get("content") not in (None, content):
        raise DataError(f"message {number} has both `value` and `content`, which differ: keep one of them")
    message = {"role": role, "content": content}
    if len(item) > 2 or content is None:
        message |= {k: v for k, v in item.items() if v is not None and k not in (role_key, content_key)}
    if name in _CALLS:
        message |= {"content": None, "tool_calls": content}
    if "tool_calls" in message and not _put_tool_calls(message, number):
        del message["tool_calls"]
    if not isinstance(message["content"], str):
        message["content"] = _joined(message, number)
    if role == "assistant" and len(message) > 2:
        if message.get("weight") == 0:
            raise DataError(
                f"message {number} has the weight 0, which is not supported: make it part of a prompt, or drop it"
            )
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None and not isinstance(reasoning, str):
            raise DataError(f"the reasoning of message {number} is {kind(reasoning)}, not text")
        if reasoning is not None:
            message |= {"reasoning_content": reasoning, "thinking": reasoning}
    return message


def _joined(message: dict[str, Any], number: int) -> str | None:
    """Content that is not a string: text parts, joined; or None, which a message may have that calls tools."""
    content = message["content"]
    if content is None and "tool_calls" in message:
        return None
    if not isinstance(content, list):
        raise DataError(f"the content of message {number} is {kind(content)}, neither text nor text parts")
    texts = []
    for part in content:
        type_, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
        if type_ != "text":
            raise DataError(f"message {number} has a part of the type {type_}: only text can be trained on")
        if not isinstance(text, str):
            raise DataError(f"message {number} has a text part without text")
        texts.append(text)
    return "".join(texts)


def _put_tool_calls(message: dict[str, Any], number: int) -> bool:
    """Normalises `message["tool_calls"]` in place; False if it holds no call."""
    calls = message["tool_calls"]
    if isinstance(calls, str):
        calls = _decoded(calls, f"tool_calls of message {number}")
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list):
        raise DataError(f"the tool calls of message {number} are {kind(calls)}, not a list")
    message["tool_calls"] = [_tool_call(call, number) for call in calls]
    return bool(calls)


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    if isinstance(call, dict) and "function" not in call:  # the bare {"name", "arguments"}
        outer = {key: call[key] for key in ("id", "type") if key in call}
        call = outer | {"function": {key: value for key, value in call.items() if key not in outer}}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f'message {number} has a tool call that is not {{"function": {{"name", "arguments"}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed_object(arguments)
    call = {"type": "function"} | {key: value for key, value in call.items() if value is not None}
    return call | {"function": function | {"arguments": {} if arguments is None else arguments}}


def _parsed_object(text: str) -> dict[str, Any] | str:
    """Arguments as an object, as nearly all chat templates want them; text that is no JSON object stays what it is."""
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
