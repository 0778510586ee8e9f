"""Labels under every chat template that TRL ships, against what `apply_chat_template` gives at inference.

The tokenizer is a byte-level BPE trained on GSM8K that holds each template's special tokens. The oracle knows nothing
of the encoder: a turn's prompt is tokenized by `apply_chat_template(..., add_generation_prompt=True)`, and its answer
is what the rendering with the turn has behind that, up to the terminator of `ENDS`. Where a rendering does not follow
from its generation prompt, the answer stands in `ANSWERS`, in full.
"""
# ruff: noqa: RUF001 (DeepSeek's tokens are written with full-width bars)

import copy
import re
from itertools import pairwise
from pathlib import Path

import pytest
import trl

from real_text import train_tokenizer
from truetune.data.chat import Encoder
from truetune.data.errors import DataError
from truetune.data.rows import Row

FOLDER = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
PLAIN = [name for name in TEMPLATES if not name.endswith("_training")]
MASKED = {name: TEMPLATES.get(f"{name}_training", TEMPLATES[name]) for name in PLAIN}  # LFM2.5's own has the tags
MASKED = {name: text for name, text in MASKED.items() if "endgeneration" in text}
SPECIAL_TOKENS = re.compile(
    r"<\|[^|<>\s'\"{}]+\|>|<｜[^｜]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|</?think>|</?tool_call>|</?tool_response>"
    r"|<(?:start|end)_of_\w+>|</s>|\[gMASK\]|<sop>|<image>"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, thinking=None, **more):
    reasoning = {} if thinking is None else {"reasoning_content": thinking, "thinking": thinking}
    return {"role": "assistant", "content": content, **reasoning, **more}


FIRST, SECOND = user("What is 6 times 7?"), user("And 2 plus 3?")
CALL = {"type": "function", "id": "c1", "function": {"name": "multiply", "arguments": {"a": 6, "b": 7}}}
RESULT = {"role": "tool", "content": "The result is 42", "tool_call_id": "c1", "name": "multiply"}
NUMBER = {"type": "integer", "description": "a number"}
PARAMETERS = {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]}
TOOLS = [{"type": "function", "function": {"name": "multiply", "description": "Multiplies.", "parameters": PARAMETERS}}]
CHATS = {
    "single": [FIRST, assistant("It is 42.")],
    "many": [FIRST, assistant("It is 42."), SECOND, assistant("Five."), user("Thanks")],
    "system": [{"role": "system", "content": "Be brief."}, FIRST, assistant("It is 42."), SECOND, assistant("Five.")],
    "tools": [FIRST, assistant("", tool_calls=[CALL]), RESULT, assistant("It is 42.")],
    "thinking": [FIRST, assistant("It is 42.", "Six sevens."), SECOND, assistant("Five.", "Add them.")],
    "thinking with tools": [
        FIRST,
        assistant("", "Call it.", tool_calls=[CALL]),
        RESULT,
        assistant("It is 42.", "I see."),
    ],
    "thinking in content": [FIRST, assistant("<think>\nSix sevens.\n</think>\n\nIt is 42.")],
}

# A key of the tables below is the beginning of template names; one that ends with a dot is a whole name.
ENDS = {  # what ends an answer; where a call of a tool ends otherwise, that too
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<｜end▁of▁sentence｜>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma.": ["<end_of_turn>"],
    "gemma3": ["<end_of_turn>"],
    "gemma4_v2": ["<turn|>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "muse": ["<|eot|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|end|>"],
    "qwen": ["<|im_end|>"],
    "smolvlm": ["<end_of_utterance>"],
}
# GLM writes nothing at the end of a turn: generation stops on the header of whoever speaks next.
STOPS = {"glm4moe": ["<|user|>", "<|observation|>"]}

REFUSES_TOOLS = ("cohere", "gemma.", "gemma3", "llava_next")
REFUSES = {
    "tools": REFUSES_TOOLS,
    "thinking with tools": REFUSES_TOOLS,
    "system": ("gemma.",),
}
LEAVES_OUT_TOOL_CALLS = ("deepseek_r1", "idefics3", "lfm2.", "llama3.", "phi3", "qwen2_5_vl", "smolvlm")
UNROLLED = {
    "many": ("deepseek", "gptoss", "nemotron", "qwen3.", "qwen3_5", "qwen3_6"),
    "system": ("deepseek", "gptoss", "nemotron", "qwen3.", "qwen3_5", "qwen3_6"),
    "tools": ("deepseekv3", "nemotron", "qwen3."),
    "thinking": (
        *("deepseek", "gptoss", "nemotron", "qwen3.", "qwen3_5", "qwen3_6"),
        *("diffusion_gemma", "gemma4_v5", "glm4moe", "lfm2_2_5"),
    ),
    "thinking with tools": ("deepseekv3",),
}
# No thinking by default; a turn that thinks was told to.
PROMPTED_TO_THINK = {"qwen3_5_nothink": ("thinking", "thinking with tools", "thinking in content")}

EOS = "<｜end▁of▁sentence｜>"
DEEPSEEK_CALL = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>multiply\n```json\n{"a": 6, "b": 7}\n```'
    f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
)
XML_CALL = (
    "<tool_call>\n<function=multiply>\n<parameter=a>\n6\n</parameter>\n<parameter=b>\n7\n</parameter>\n</function>\n"
    "</tool_call>\n<|im_end|>"
)
GPT_OSS_ANSWER = (
    "<|channel|>analysis<|message|>I see.<|end|><|start|>assistant<|channel|>final<|message|>It is 42.<|return|>"
)
ANSWERS = {
    # The generation prompt begins to think; the rendering leaves out what was thought.
    "deepseek": {
        "single": {1: f"\n</think>\n\nIt is 42.{EOS}"},
        "many": {1: f"\n</think>\n\nIt is 42.{EOS}", 3: f"\n</think>\n\nFive.{EOS}"},
        "system": {2: f"\n</think>\n\nIt is 42.{EOS}", 4: f"\n</think>\n\nFive.{EOS}"},
        "thinking": {1: f"Six sevens.\n</think>\n\nIt is 42.{EOS}", 3: f"Add them.\n</think>\n\nFive.{EOS}"},
        "thinking in content": {1: f"Six sevens.\n</think>\n\nIt is 42.{EOS}"},
        "tools": {1: f"\n</think>\n\n{DEEPSEEK_CALL}"},
        "thinking with tools": {1: f"Call it.\n</think>\n\n{DEEPSEEK_CALL}"},
    },
    # The generation prompt ends with a line break that an empty thinking block does not have.
    "nemotron": {
        "single": {1: "</think>It is 42.<|im_end|>"},
        "many": {1: "</think>It is 42.<|im_end|>", 3: "</think>Five.<|im_end|>"},
        "system": {2: "</think>It is 42.<|im_end|>", 4: "</think>Five.<|im_end|>"},
        "tools": {1: f"</think>\n{XML_CALL}", 3: "</think>It is 42.<|im_end|>"},
    },
    # With the final answer there, the rendering drops the thinking before the call, which was there at inference.
    "gptoss": {"thinking with tools": {3: GPT_OSS_ANSWER}},
}

# Tokens that only TRL's assistant mask covers: those of the generation prompt before the answer, text after its end.
MASK_ALSO_COVERS = {
    "deepseek": [("<｜Assistant｜>", ""), ("<｜Assistant｜><think>\n", ""), ("<｜tool▁outputs▁end｜>", "")],
    "diffusion_gemma": [("", "\n")],
    "gemma.": [("", "\n")],
    "gemma3": [("", "\n")],
    "gptoss": [("<|start|>assistant", "")],
    "idefics3": [("", "\n")],
    "lfm2": [("", "\n")],
    "muse": [("<|start|>assistant", "")],
    "nemotron": [("<think>", "\n"), ("<think>\n", "\n")],
    "phi3": [("", "\n<eos>")],
    "qwen2_5.": [("\n", "\n")],
    "qwen2_5_vl": [("", "\n")],
    "qwen3.": [("", "\n")],
    "qwen3_5_nothink": [("<think>\n\n</think>\n\n", "\n"), ("<think>\n", "\n")],
    "qwen3_5_think": [("<think>\n", "\n")],
    "qwen3_6": [("<think>\n", "\n")],
    "qwen3_8": [("<think>\n", "\n")],
    "qwen3_instruct": [("", "\n")],
    "qwen3_vl": [("", "\n")],
    "smolvlm": [("", "\n")],
}
# Where the trained text itself is another one, and why.
MASK_DIFFERS = {
    # TRL's templates leave out `reasoning_content`, and write no thinking block although their prompt begins one; that
    # of DeepSeek-V3 leaves out thinking in content too.
    "deepseek_r1": ("single", "many", "system", "thinking"),
    "deepseekv3": tuple(CHATS),
    # TRL's mask does not cover the token that a call of a tool stops on, nor the header behind a tool's result, which
    # this template's generation prompt leaves out.
    "diffusion_gemma": ("tools", "thinking with tools"),
}


def of(table, name):
    """The entry for a template: of the longest key that fits its name, or None."""
    fitting = [key for key in table if f"{name}.".startswith(key)]
    return table[max(fitting, key=len)] if fitting else None


def listed(beginnings, name):
    return any(f"{name}.".startswith(beginning) for beginning in beginnings)


@pytest.fixture(scope="module")
def trained(gsm8k_rows):
    texts = [row["question"] + "\n" + row["answer"] for row in gsm8k_rows[:300]]
    return train_tokenizer(texts, ["<pad>", "<eos>"], 800)


@pytest.fixture(scope="module")
def template(request, trained):
    """A template's name, a tokenizer that has it with its special tokens, and its encoder."""
    tokenizer = copy.deepcopy(trained)
    tokenizer.chat_template = TEMPLATES[request.param]
    tokens = sorted(set(SPECIAL_TOKENS.findall(tokenizer.chat_template)))
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": tokens})
    return request.param, tokenizer, Encoder(tokenizer)


@pytest.fixture
def render(template):
    """`apply_chat_template` for a chat's first `turns` messages, as a server would call it."""
    name, tokenizer, _ = template
    in_parts = name in ("idefics3", "smolvlm", "llava_next")

    def apply(chat, turns, **settings):
        messages = copy.deepcopy(CHATS[chat][:turns])
        for message in messages:
            if in_parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
            for call in message.get("tool_calls", []):
                if name == "deepseekv3" and "chat_template" not in settings:
                    call["function"] = CALL["function"] | {"arguments": '{"a": 6, "b": 7}'}
        return tokenizer.apply_chat_template(messages, tools=TOOLS if "tools" in chat else None, **settings)

    return apply


def encode(encoder, chat):
    row = Row(messages=CHATS[chat], tools=TOOLS if "tools" in chat else None, origin="chats.jsonl:1")
    return encoder.encode([row])


def spans(document):
    """(start, end) of each run of supervised tokens; every label in it is the token itself."""
    assert all(label in (-100, token) for token, label in zip(document.input_ids, document.labels, strict=True))
    supervised = [False, *(label != -100 for label in document.labels), False]
    edges = [i for i, (before, after) in enumerate(pairwise(supervised)) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def turns_to_supervise(name, chat):
    turns = [i for i, message in enumerate(CHATS[chat]) if message["role"] == "assistant"]
    return turns[1:] if "tools" in chat and listed(LEAVES_OUT_TOOL_CALLS, name) else turns


def expected_answer(name, chat, turn, prompt, whole):
    if answer := (of(ANSWERS, name) or {}).get(chat, {}).get(turn):
        return answer
    assert whole.startswith(prompt)
    rest = whole[len(prompt) :]
    calls = "tool_calls" in CHATS[chat][turn]
    if stops := of(STOPS, name):
        return rest + stops[calls]
    answer, end, tail = rest.rpartition(of(ENDS, name)[-1 if calls else 0])
    assert not tail.strip() or tail.strip() == "<eos>"
    return answer + end


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", PLAIN, indirect=True)
def test_answers_are_supervised_behind_the_prompt_that_inference_gives(template, render, chat):
    name, tokenizer, encoder = template
    if listed(REFUSES.get(chat, ()), name):
        with pytest.raises(DataError, match=r"^chats\.jsonl:1: the chat template refuses"):
            encode(encoder, chat)
        return
    if not (of(ENDS, name) or of(STOPS, name)):
        pytest.fail(f"{name} is new in TRL: give it an entry in ENDS")
    documents, counts = encode(encoder, chat)
    think = {"enable_thinking": True} if chat in (of(PROMPTED_TO_THINK, name) or ()) else {}
    wanted = {}
    for turn in turns_to_supervise(name, chat):
        prompt = render(chat, turn, add_generation_prompt=True, **think)
        text = render(chat, turn, add_generation_prompt=True, tokenize=False, **think)
        answer = expected_answer(name, chat, turn, text, render(chat, turn + 1, tokenize=False))
        wanted[tuple(prompt["input_ids"])] = answer

    found = [
        (tuple(document.input_ids[:start]), tokenizer.decode(document.input_ids[start:end]))
        for document in documents
        for start, end in spans(document)
    ]
    assert sorted(found) == sorted(wanted.items())  # each turn once, in no matter which document
    for document in documents:
        assert document.input_ids.count(tokenizer.bos_token_id) == ("bos_token" in tokenizer.chat_template)
        tail = document.input_ids[spans(document)[-1][1] :]
        assert tokenizer.decode(tail).strip() in ("", "<eos>")
    assert len(documents) == (2 if listed(UNROLLED.get(chat, ()), name) and len(wanted) > 1 else 1)
    assert counts["tool_calls_ignored"] == ("tools" in chat and listed(LEAVES_OUT_TOOL_CALLS, name))
    assert not counts["eos_appended"] + counts["turns_without_end"] + counts["turns_ignored"]


@pytest.mark.parametrize(
    ("template", "chat"),
    [(name, chat) for name in MASKED for chat in CHATS if not listed(REFUSES.get(chat, ()), name)],
    indirect=["template"],
)
def test_trl_assistant_mask_covers_the_same_answers(template, render, chat):
    name, tokenizer, encoder = template
    documents, _ = encode(encoder, chat)
    ours = [tokenizer.decode(document.input_ids[start:end]) for document in documents for start, end in spans(document)]
    known = []
    for turn, answer in zip(turns_to_supervise(name, chat), ours, strict=True):
        masked = render(chat, turn + 1, chat_template=MASKED[name], return_assistant_tokens_mask=True)
        mask = masked["assistant_masks"]
        end = len(mask) - mask[::-1].index(1)
        start = next((i + 1 for i in reversed(range(end)) if not mask[i]), 0)
        theirs = tokenizer.decode(masked["input_ids"][start:end])
        surplus = of(MASK_ALSO_COVERS, name) or [("", "")]
        known.append(theirs in [before + answer + after for before, after in surplus])
    assert all(known) == (chat not in (of(MASK_DIFFERS, name) or ()))
