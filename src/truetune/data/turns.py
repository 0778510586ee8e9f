"""Conversations -> documents of text: what a model reads, and what it has to write.

For the assistant turn i, with R(n) the chat template's rendering of the first n messages:

    prompt   R(i) with the generation prompt: what the model has before it at inference
    answer   what R(i + 1) has behind that, up to and with the token that ends the turn: what the model has to generate
    tail     what R(i + 1) has behind the answer (the line break after <|im_end|>)

No `{% generation %}` tags are needed. A turn whose prompt + answer a later turn's prompt begins with shares that turn's
document. Where the template rewrites earlier turns (drops their thinking, ends them otherwise than the last one), it
does not, and the turn becomes a document of its own: the conversation is unrolled.

Templates without a token that ends a turn: GLM stops on the header of whoever speaks next (<|user|>, <|observation|>),
which is then the end of the answer; plain text ends with the tokenizer's EOS, which is put behind the answer.
"""

import inspect
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from truetune.data.errors import DataError
from truetune.data.limits import OutOfTime, limited
from truetune.data.rows import Row
from truetune.data.templates import BUILTIN_TEMPLATES

Message = dict[str, Any]

# How reasoning is enclosed, and the white space that ends its closing tag.
_REASONING_TAGS = (("<think>", "</think>", "\n\n"), ("<|channel>thought", "<channel|>", ""))
_NOT_REASONED = re.compile(r"\s*(<think>\s*</think>|</think>|<\|channel>thought\s*<channel\|>|<channel\|>)")
_QUESTION, _REPLY, _FOLLOW_UP = "first-question-7f3a", "reply-7f3a", "follow-up-7f3a"
_CONVERSATIONS_A_CALL = 32  # that share the limit of time


class Segment(NamedTuple):
    """A part of a document. `role`: whose text it is; "" of a text that the template made of all `messages`."""

    text: str
    supervised: bool
    role: str = ""
    messages: Sequence[Message] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """`role`: of the message that is the answer."""

    prompt: str
    answer: str
    tail: str
    role: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A row's messages as templates take them. `prefill`: how much of the first supervised turn's content is prompt."""

    row: Row
    messages: list[Message]
    first_supervised: int
    prefill: str | None = None


class TurnRenderer:
    """Renders conversations through the tokenizer's `apply_chat_template` and finds what is to be generated in them.

    chat_template: template text, or None for the tokenizer's own. Raises `DataError` when it is asked to render with
    neither, and when the template refuses a conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        if chat_template is None and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template to render conversations with: choose one with chat_template "
                f"(built in: {', '.join(BUILTIN_TEMPLATES)}; or a .jinja file)"
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        self._tokens = {token for token in added if token.strip()}
        self._token_lengths = sorted({len(token) for token in self._tokens}, reverse=True)
        # What our calls say themselves, or would change what they give. A template may want `documents`.
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
        self._taken = {*arguments, "messages"} - {"documents", "kwargs"}
        self._content_in_parts = False
        self._terminators: set[str] = set()  # tokens that end a turn inside its own rendering
        self._suffix: str | None = None  # what the template writes behind an answer where it ends it with no token
        self._stop: dict[str, str] | None = None  # or: role that speaks next -> the token its header begins with
        self._ignored: dict[str, bool] = {}  # "tools" or a role -> whether the template leaves it out
        self._learn()

    def turns(self, rows: Sequence[Row], last_only: bool, counts: Counter[str]) -> list[list[Turn]]:
        """The supervised turns of each row, in order; `counts` takes up what the caller should report."""
        chats = [self._chat(row) for row in rows]
        for chat in chats:
            self._count_ignored(chat, counts)
        wanted = [_supervised(chat, last_only, counts) for chat in chats]
        jobs = [(chat, i) for chat, turns in zip(chats, wanted, strict=True) for i in turns]
        prompts = iter(self._render([(chat, chat.messages[:i]) for chat, i in jobs], generation_prompt=True))
        wholes = iter(self._render([(chat, chat.messages[: i + 1]) for chat, i in jobs]))
        return [
            [turn for i in turns if (turn := self._turn(chat, i, next(prompts), next(wholes), counts)) is not None]
            for chat, turns in zip(chats, wanted, strict=True)
        ]

    def whole(self, rows: Sequence[Row], supervised: bool) -> list[Segment]:
        """The rendering of each whole conversation."""
        jobs = [(chat, chat.messages) for chat in map(self._chat, rows)]
        texts = self._render(jobs)
        if not supervised:
            return [Segment(text, False, "prompt") for text in texts]
        return [Segment(text, True, messages=messages) for text, (_, messages) in zip(texts, jobs, strict=True)]

    # ---- rendering ---------------------------------------------------------------------------------------------------

    def _chat(self, row: Row) -> Chat:
        assert row.messages is not None
        if taken := self._taken & row.template_kwargs.keys():
            raise DataError(
                f"{row.origin}: `chat_template_kwargs` sets {min(taken)}, which is no variable of a chat template but "
                "decides how it is rendered: remove it"
            )
        messages = [{key: value for key, value in message.items() if value is not None} for message in row.messages]
        for message in messages:
            message.setdefault("content", "")  # beside tool calls; many templates fail on a missing or a null one
        first = row.first_supervised
        begun, rest = messages[max(first - 1, 0) : first], messages[first:]
        if begun and rest and begun[0]["role"] == rest[0]["role"] == "assistant" and not begun[0].get("tool_calls"):
            # The prompt ends inside the assistant's turn, which the completion continues.
            prefill = begun[0]["content"]
            joined = rest[0] | {"content": prefill + rest[0]["content"]}
            return Chat(row, [*messages[: first - 1], joined, *rest[1:]], first - 1, prefill)
        return Chat(row, messages, first)

    def _render(self, jobs: Sequence[tuple[Chat, list[Message]]], generation_prompt: bool = False) -> list[str]:
        """Renders messages with their rows' tools and template arguments; those that share them in one call."""
        groups: dict[str, list[int]] = {}
        for number, (chat, _) in enumerate(jobs):
            row = chat.row
            shared = (
                json.dumps([row.tools, row.template_kwargs], default=repr) if row.tools or row.template_kwargs else ""
            )
            groups.setdefault(shared, []).append(number)
        texts = [""] * len(jobs)
        for numbers in groups.values():
            row = jobs[numbers[0]][0].row
            batch = [jobs[number][1] for number in numbers]
            try:
                rendered = self._apply(batch, row, generation_prompt)
            except Exception:  # a template is code of its own, and fails in its own ways
                rendered = [self._render_alone(*jobs[number], generation_prompt) for number in numbers]
            for number, text in zip(numbers, rendered, strict=True):
                texts[number] = text
        return texts

    def _render_alone(self, chat: Chat, messages: list[Message], generation_prompt: bool = False) -> str:
        try:
            return self._apply([messages], chat.row, generation_prompt)[0]
        except DataError:
            raise
        except Exception as error:
            if any("tool_calls" in message for message in messages):
                try:  # DeepSeek-V3 wants the arguments of a call as JSON text, all others as an object
                    return self._apply([list(map(_with_text_arguments, messages))], chat.row, generation_prompt)[0]
                except Exception:
                    pass  # the refusal of the conversation as it is says more than that of ours
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{chat.row.origin}: the chat template refuses the conversation ({reason}): mend the row, or choose "
                "another template with chat_template"
            ) from None

    def _apply(self, conversations: list[list[Message]], row: Row | None, generation_prompt: bool) -> list[str]:
        if self._content_in_parts:
            conversations = [list(map(_with_parts, messages)) for messages in conversations]
        tools, kwargs = (row.tools, row.template_kwargs) if row is not None else (None, {})
        texts: list[str] = []
        for first in range(0, len(conversations), _CONVERSATIONS_A_CALL):
            try:
                with limited():
                    texts += self.tokenizer.apply_chat_template(
                        conversations[first : first + _CONVERSATIONS_A_CALL],
                        tools=tools,  # type: ignore[arg-type]
                        chat_template=self.chat_template,
                        add_generation_prompt=generation_prompt,
                        tokenize=False,
                        **kwargs,
                    )
            except (OutOfTime, MemoryError) as error:
                what = "memory" if isinstance(error, MemoryError) else "time"
                where = f"{row.origin}: " if row is not None and row.origin else ""
                raise DataError(
                    f"{where}the chat template takes far more {what} than rendering a conversation needs: mend it, or "
                    "choose another with chat_template"
                ) from None
        for text in texts:
            text.encode()  # a template can write half of a surrogate pair, which no tokenizer takes
        return texts

    def _count_ignored(self, chat: Chat, counts: Counter[str]) -> None:
        """Counts rows of which the template leaves out the tools, or all messages of a role."""
        found = {message["role"] for message in chat.messages} - {"user", "assistant"}
        for part in found | {"tools"} if chat.row.tools else found:
            if part not in self._ignored:
                without = replace(chat, row=replace(chat.row, tools=None)) if part == "tools" else chat
                changed = [
                    message | {"content": message["content"] + _REPLY} if message["role"] == part else message
                    for message in chat.messages
                ]
                self._ignored[part] = self._render_alone(chat, chat.messages) == self._render_alone(without, changed)
            counts[f"{part}_ignored"] += self._ignored[part]

    # ---- what a turn has to generate ---------------------------------------------------------------------------------

    def _turn(self, chat: Chat, i: int, prompt: str, whole: str, counts: Counter[str]) -> Turn | None:
        message = chat.messages[i]
        if chat.prefill is not None and i == chat.first_supervised:
            prompt = self._prefilled(chat, i, whole)
        answer = _behind(prompt, whole, message)
        reasoning = _reasoning(message)
        lost = reasoning and reasoning in whole and (answer is None or reasoning not in answer)
        if lost and "enable_thinking" not in chat.row.template_kwargs:
            # The template's prompt skips thinking unless it is told to think (Qwen3.5), and this turn thinks.
            told = self._render_alone(_with_kwargs(chat, enable_thinking=True), chat.messages[:i], True)
            if whole.startswith(told):
                prompt, answer = told, whole[len(told) :]
        if answer is None:
            answer = self._answer_alone(chat, i, prompt, whole)
        answer, tail = self._terminated(chat, message, answer, counts)
        if not answer or not self._is_written(chat, i, whole, answer):
            counts["turns_ignored"] += 1
            return None
        if any(call["function"]["name"] not in answer for call in message.get("tool_calls") or ()):
            counts["tool_calls_ignored"] += 1
            return None
        counts["empty_answers"] += not (message["content"].strip() or message.get("tool_calls"))
        counts["thinking_ignored"] += reasoning not in answer
        counts["empty_think_supervised"] += _NOT_REASONED.match(answer) is not None
        return Turn(prompt, answer, tail, message["role"])

    def _is_written(self, chat: Chat, i: int, whole: str, answer: str) -> bool:
        """Whether what stands in the answer's place comes from the message at all."""
        message = chat.messages[i]
        content = _spoken(message)
        if content in answer or message.get("tool_calls") or (chat.prefill is not None and i == chat.first_supervised):
            return True
        other = message | {"content": message["content"] + _REPLY}
        return self._render_alone(chat, [*chat.messages[:i], other]) != whole

    def _prefilled(self, chat: Chat, i: int, whole: str) -> str:
        """The prompt of a turn whose beginning is given: everything before the first character to be generated."""
        content, given = chat.messages[i]["content"], chat.prefill or ""
        mark = _REPLY
        while mark in whole:  # the data may hold any text
            mark += _REPLY
        marked = chat.messages[i] | {"content": given + mark + content[len(given) :]}
        return self._render_alone(chat, [*chat.messages[:i], marked]).partition(mark)[0]

    def _answer_alone(self, chat: Chat, i: int, prompt: str, whole: str) -> str:
        """The answer where the turn changes how its own history is rendered (gpt-oss drops the thinking before earlier
        tool calls once a final answer is there): the same message as the only answer to a question."""
        question = [{"role": "user", "content": _QUESTION}]
        message = chat.messages[i]
        asked = self._render_alone(chat, question)
        bare_prompt = self._render_alone(chat, question, generation_prompt=True)
        answer = _behind(bare_prompt, self._render_alone(chat, [*question, message]), message)
        generation_prompt = bare_prompt[shared_length(asked, bare_prompt) :]
        if answer is None or not prompt.endswith(generation_prompt):
            shared = shared_length(prompt, whole)
            raise DataError(
                f"{chat.row.origin}: message {i + 1} cannot be supervised, because the chat template renders it as "
                f"{whole[shared : shared + 40]!r} where its generation prompt has {prompt[shared : shared + 40]!r}: "
                "choose another template with chat_template"
            )
        return answer

    def _terminated(self, chat: Chat, message: Message, text: str, counts: Counter[str]) -> tuple[str, str]:
        """Cuts what stands behind the generation prompt at the end of the turn: (answer, tail)."""
        if self._stop is None:
            tokens = self._tokens_at_end(text)
            for known in (self._terminators, {self.tokenizer.eos_token}):
                for start, end in tokens:
                    if text[start:end] in known:
                        return text[:end], text[end:]
            behind = self._first_terminator(text, message)
            if behind is not None:
                return text[:behind], text[behind:]
            if tokens:  # tool calls end with a token of their own: the last before any white space
                end = next((end for (_, end), (start, _) in pairwise(tokens) if end != start), tokens[-1][1])
                return text[:end], text[end:]
        text = text.rstrip()
        content = _spoken(message)
        if self._suffix is not None and content and content in text and not message.get("tool_calls"):
            more = text.rpartition(content)[2].strip()
            if more not in ("", self._suffix):
                raise DataError(
                    f"{chat.row.origin}: the chat template writes {more[:40]!r} behind an answer, and no token that "
                    "ends it: choose another template with chat_template"
                )
        return text + self._stop_text(chat, message, counts) if text else "", ""

    def _first_terminator(self, text: str, message: Message) -> int | None:
        """The end of the first terminator behind the message's content: what follows it is never generated."""
        content = _spoken(message)
        if not content or content not in text or message.get("tool_calls"):
            return None
        start = text.rindex(content) + len(content)
        ends = [place + len(end) for end in self._terminators if (place := text.find(end, start)) >= 0]
        return min(ends, default=None)

    def _stop_text(self, chat: Chat, message: Message, counts: Counter[str]) -> str:
        """What ends an answer that the template ends with nothing."""
        role = "tool" if message.get("tool_calls") else "user"
        if self._stop is not None and role not in self._stop:
            turn = {key: message[key] for key in ("role", "content", "tool_calls")}
            head = [{"role": "user", "content": _QUESTION}, turn]
            before = self._render_alone(chat, head)
            after = self._render_alone(chat, [*head, {"role": role, "content": _FOLLOW_UP}])
            self._stop[role] = self._token_at_start(after[len(before) :]) if after.startswith(before) else ""
        if self._stop and self._stop[role]:
            return self._stop[role]
        counts["eos_appended" if self.tokenizer.eos_token else "turns_without_end"] += 1
        return str(self.tokenizer.eos_token or "")

    # ---- the template's habits ---------------------------------------------------------------------------------------

    def _learn(self) -> None:
        """Finds from a small conversation whether content has to come in parts, and what ends an assistant turn."""
        chat: list[Message] = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}]
        for self._content_in_parts in (False, True):
            try:
                last, followed = (
                    self._apply([messages], None, False)[0]
                    for messages in (chat, [*chat, {"role": "user", "content": _FOLLOW_UP}])
                )
            except TemplateSyntaxError as error:
                raise DataError(f"the chat template is no valid Jinja (line {error.lineno}: {error.message})") from None
            except DataError:
                raise
            except Exception:
                continue
            if _QUESTION in last and _REPLY in last and _FOLLOW_UP in followed:
                break
        else:
            self._content_in_parts = False
            return
        if not (
            followed.rfind(_QUESTION) < followed.find(_REPLY) <= followed.rfind(_REPLY) < followed.find(_FOLLOW_UP)
        ):
            raise DataError(
                "the chat template does not write messages in their order, each once, so that nothing says which "
                "answer follows from what: choose another with chat_template"
            )
        last = last.rpartition(_REPLY)[2]
        followed = followed.rpartition(_REPLY)[2].partition(_FOLLOW_UP)[0]
        # phi3 puts EOS behind the last turn's <|end|>: a turn ends where the last one and an earlier one still agree.
        tokens = self._tokens_at_end(last)
        agreed = shared_length(last, followed)
        tokens = [token for token in tokens if token[1] <= agreed] or tokens
        if tokens:
            start, end = tokens[-1]
            self._terminators = {last[start:end]}
        else:
            self._stop = {"user": self._token_at_start(followed)}
            self._suffix = last.strip()

    def _tokens_at_end(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of the added tokens that `text` ends with; nothing but white space stands among them."""
        found: list[tuple[int, int]] = []
        end = len(text)
        while True:
            while end and text[end - 1].isspace():
                end -= 1
            length = next((n for n in self._token_lengths if n <= end and text[end - n : end] in self._tokens), 0)
            if not length:
                return found[::-1]
            found.append((end - length, end))
            end -= length

    def _token_at_start(self, text: str) -> str:
        text = text.lstrip()
        return next((text[:n] for n in self._token_lengths if text[:n] in self._tokens), "")


def documents(turns: Iterable[Turn]) -> list[list[Segment]]:
    """As few documents as possible in which each turn is supervised once, exactly as it is at inference."""
    shared: list[list[Turn]] = []
    for turn in reversed(list(turns)):
        seen = turn.prompt + turn.answer
        for document in shared:
            if document[0].prompt.startswith(seen):
                document.insert(0, turn)
                break
        else:
            shared.append([turn])
    return [_segments(document) for document in reversed(shared)]


def _segments(turns: Sequence[Turn]) -> list[Segment]:
    segments: list[Segment] = []
    done = 0
    for turn in turns:
        segments.append(Segment(turn.prompt[done:], False, "prompt"))
        segments.append(Segment(turn.answer, True, turn.role))
        done = len(turn.prompt) + len(turn.answer)
    return [*segments, Segment(turns[-1].tail, False, "template")]


def _supervised(chat: Chat, last_only: bool, counts: Counter[str]) -> list[int]:
    """The indexes of the turns to supervise. A turn before the first user's has no prompt that would lead to it."""
    roles = [message["role"] for message in chat.messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant" and i >= chat.first_supervised]
    opening = 1 if chat.row.first_supervised else max(1, [*roles, "user"].index("user"))
    counts["opening_turns_unsupervised"] += sum(i < opening for i in turns)
    return [i for i in turns if i >= opening][-1 if last_only else 0 :]


def _behind(prompt: str, whole: str, message: Message) -> str | None:
    """What `whole` has to generate behind `prompt`; None if it does not follow from it."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    stem = prompt.rstrip()
    if whole.startswith(stem):  # "<think>\n" to be continued by "<think></think>"
        return whole[len(stem) :].lstrip()
    for opening, closing, gap in _REASONING_TAGS:
        block = re.search(rf"{re.escape(opening)}\s*({re.escape(closing)}\s*)?$", prompt)
        if block is None or not whole.startswith(prompt[: block.start()]):
            continue
        rest = whole[block.start() :]
        if block[1]:  # the generation prompt skips thinking: what was thought in the data is not to be generated
            return rest.partition(closing)[2].lstrip() if rest.lstrip().startswith(opening) else rest
        # The generation prompt begins to think, and the template leaves out what was thought (DeepSeek-R1).
        if rest.lstrip().startswith(closing):
            return _reasoning(message) + rest.lstrip()
        return f"{_reasoning(message)}\n{closing}{gap}{rest.lstrip()}"
    return None


def _reasoning(message: Message) -> str:
    reasoning = message.get("reasoning_content") or message.get("thinking") or message.get("reasoning")
    if reasoning is None:
        content = message["content"]
        reasoning = content.partition("</think>")[0].rpartition("<think>")[2] if "</think>" in content else ""
    return reasoning.strip()


def _spoken(message: Message) -> str:
    """The content without the reasoning before it and the white space round it, which templates leave out."""
    return str(message["content"]).rpartition("</think>")[2].strip()


def _with_kwargs(chat: Chat, **kwargs: Any) -> Chat:
    return replace(chat, row=replace(chat.row, template_kwargs=chat.row.template_kwargs | kwargs))


def _with_parts(message: Message) -> Message:
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _as_text(call["function"].get("arguments") or {})}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _as_text(arguments: Mapping[str, Any] | str) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items `a` and `b` have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
