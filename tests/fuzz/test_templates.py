"""Any text that calls itself a chat template: labels that are answers and nothing else, or one sentence."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truetune.data import limits
from truetune.data.chat import COUNTS, Encoder
from truetune.data.rows import Row
from truetune.data.templates import BUILTIN_TEMPLATES

from .cases import Mistake, assert_one_sentence, fuzzed, runs_of, texts


@pytest.fixture(autouse=True, scope="module")
def impatience():
    """What is far too long for three short messages; the limits themselves are for long ones."""
    before = limits.SECONDS, limits.GIBIBYTES
    limits.SECONDS, limits.GIBIBYTES = 0.25, 0.5
    yield
    limits.SECONDS, limits.GIBIBYTES = before


# -- templates that may be meant ---------------------------------------------------------------------------------------

orders = st.sampled_from(
    ["messages"] * 6
    + [
        "messages|reverse",
        "messages|sort(attribute='role')",
        "messages|sort(attribute='content')",
        "messages|rejectattr('role', 'equalto', 'user')",
        "messages|rejectattr('role', 'equalto', 'assistant')",
        "messages|rejectattr('role', 'equalto', 'system')",
        "messages[-2:]",
        "messages[:2]",
        "messages[1:]",
        "messages|unique(attribute='role')",
        "messages + messages",
        "messages[::2] + messages[1::2]",
        "[messages[-1]]",
        "messages|batch(2)|first",
        "messages|map(attribute='content')",
    ]
)
heads = st.sampled_from(
    [
        "<|im_start|>{{ m.role }}\n",
        "{{ m['role'] }}: ",
        "{{ m.role|upper }}\n",
        "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n",
        "",
        "{% if not loop.first %}\n{% endif %}",
        "<think>\n",
        "{{ loop.index }}. ",
    ]
)
bodies = st.sampled_from(
    ["{{ m.content }}"] * 5
    + [
        "{{ m['content']|trim }}",
        "{{ m.content.split('</think>')[-1] }}",
        "{{ m.content.split('</think>')[-1]|trim if not loop.last else m.content }}",
        "{{ m.content|upper }}",
        "{{ m.content[::-1] }}",
        "{{ m.content[:3] }}",
        "{{ m.content|tojson }}",
        "{{ m.content if m.role != 'assistant' }}",
        "{{ messages[0].content }}",
        "{{ m.content }}{{ m.content }}",
        "{{ m.missing.content }}",
        "{% for part in m.content %}{{ part.text }}{% endfor %}",
        "{% generation %}{{ m.content }}{% endgeneration %}",
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
    ]
)
ends = st.sampled_from(["<|im_end|>\n", "<|im_end|>", "{{ eos_token }}", "\n", "", "</s>", "<|endoftext|> "])
tails = st.sampled_from(
    [""] * 5
    + ["bye", "{{ messages[0].content }}", "{{ messages[-1].content }}", "<|endoftext|>", "{{ messages|length }}"]
)
prompts = st.sampled_from(
    [
        "<|im_start|>assistant\n",
        "assistant: ",
        "",
        "<think>\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "{{ messages[-1].content }}",
        "<|im_start|>",
        "x",
        "ASSISTANT\n",
        "<|im_start|>model\n",
    ]
)

_HEADS_AND_PROMPTS = [
    ("<|im_start|>{{ m.role }}\n", "<|im_start|>assistant\n"),
    ("{{ m['role'] }}: ", "assistant: "),
    ("{{ m.role }}:", "assistant:"),
    ("{{ m.role|upper }}\n", "ASSISTANT\n"),
    ("<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n", "<|im_start|>model\n"),
    ("<|im_start|>{{ m.role }}\n", "<|im_start|>assistant\n<think>\n"),
    ("<|im_start|>{{ m.role }}\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ("", ""),
    ("\n", "\n"),
]
_USUAL = [(orders, "messages"), (bodies, "{{ m.content }}"), (ends, "<|im_end|>\n"), (tails, "")]

# -- templates that mean harm, or nothing ------------------------------------------------------------------------------

harm = st.sampled_from(
    [
        "{% for a in range(10**9) %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ [0] * 10 ** 10 }}",
        "{% set ns = namespace(s='a' * 999) %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n + 1) + f(n + 2) if n < 90 else '' }}{% endmacro %}{{ f(0) }}",
        "{{ '%999999999999d' % 1 }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ 'a'.center(10 ** 11) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch broken-out') }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ''['__cl' ~ 'ass__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ [].append.__self__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ lipsum(n=10**6) }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages.pop() }}",
        "{% set _ = messages[0].update({'content': 'other'}) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
        "{{ raise_exception('no ' ~ messages[0].role) }}",
        "{{ raise_exception(messages) }}",
        "{{ 1 / 0 }}",
        "{{ 1 // 0 }}",
        "{{ 2 ** -1 }}{{ 10.0 ** 999 }}",
        "{{ missing.deeper.still }}",
        "{{ '\\ud800' }}",
        "{{ '\\x00' }}",
        "{{ messages|tojson(indent=10**9) }}",
        "{{ strftime_now('%Y') }}",
        "{{ range(5)|random }}",
        "{% break %}",
        "{% if %}",
        "{{ ",
        "{% endfor %}",
        "{% raw %}",
        "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
        "{{ " + "not " * 3000 + "1 }}",
        "{% if 1 %}" * 101 + "{% endif %}" * 101,
        "{% for x in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ f(" + ",".join(f"a{i}=1" for i in range(300)) + ") }}",
        "{% do 1 %}",
        "{{ dict(messages=1) }}",
        "{% filter upper %}",
        "{% set messages = [] %}",
        "{% macro generation() %}{% endmacro %}",
    ]
)
grammar = st.sampled_from(
    "{{ }} {% %} {# #} {%- -%} for m in messages endfor if else endif set = ( ) [ ] | . ' \" ~ + * ** // % == "
    "m.content m.role loop.last add_generation_prompt namespace range(3) trim upper tojson <|im_end|> \\n macro call "
    "endmacro block endblock generation endgeneration tools eos_token 0 1 -1 none true".split()
)
nonsense = st.lists(grammar, min_size=2, max_size=14).map(" ".join)


@st.composite
def templates(draw) -> str:
    """The frame of a chat template, its parts drawn one by one; in some, something that does not belong there."""
    if draw(st.integers(0, 19)) == 0:
        return "{{ '' }}" + draw(nonsense | texts)
    head, prompt = draw(st.sampled_from(_HEADS_AND_PROMPTS) if draw(st.integers(0, 5)) else st.tuples(heads, prompts))
    order, body, end, tail = (draw(part) if draw(st.integers(0, 2)) == 0 else usual for part, usual in _USUAL)
    parts = [
        "{% for m in " + order + " %}",
        head,
        body,
        end,
        "{% endfor %}",
        tail,
        "{% if add_generation_prompt %}" + prompt + "{% endif %}",
    ]
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        odd = draw(st.one_of(harm, nonsense, texts))
        if draw(st.booleans()):  # where only some messages meet it
            odd = (
                draw(st.sampled_from(["{% if loop.index > 2 %}", "{% if messages|length > 3 %}"])) + odd + "{% endif %}"
            )
        parts.insert(draw(st.integers(0, len(parts))), odd)
    if draw(st.integers(0, 19)) == 0:
        del parts[draw(st.integers(0, len(parts) - 1))]
    return "".join(parts)


# -- conversations whose every message can be told ---------------------------------------------------------------------

surroundings = st.sampled_from(
    ["{}", "{}", "{}", " {}", "{}\n", "{} <|im_end|>", "<think>\nhm\n</think>\n\n{}", "{}é", "\0{}"]
)


@st.composite
def conversations(draw) -> list[dict]:
    roles = draw(st.sampled_from(["ua", "ua", "uaua", "suaua", "uaa", "uuau", "ausa", "sa", "u", "a", "uauauaua"]))
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [
        {"role": names[role], "content": draw(surroundings).format(f"{names[role][0]}{i}qz{i}")}
        for i, role in enumerate(roles)
    ]


@fuzzed
@given(template=templates(), chats=st.lists(conversations(), min_size=1, max_size=2))
def test_any_template_gives_answers_as_labels_or_one_sentence(tokenizer, template, chats):
    rows = [Row(chat, origin=f"chats.jsonl:{i}") for i, chat in enumerate(chats, 1)]
    try:
        documents, counts = Encoder(tokenizer, chat_template=template).encode(rows)
    except Mistake as error:
        assert_one_sentence(error)
        return
    assert set(counts) <= set(COUNTS)
    for document in documents:
        assert len(document.input_ids) == len(document.labels)
        assert all(label in (-100, token) for token, label in zip(document.input_ids, document.labels, strict=True))
        assert set(document.labels[:1]) <= {-100}
        supervised = "".join(runs_of(tokenizer, document))
        for i, message in enumerate(chats[document.row]):
            mark = f"{message['role'][0]}{i}qz{i}"
            if message["role"] != "assistant":
                assert mark not in supervised, "a question is trained as an answer"
    text = "".join(tokenizer.decode(document.input_ids) for document in documents)
    assert "<class" not in text and "<built-in" not in text and "<function" not in text


@fuzzed
@given(
    name=st.sampled_from(sorted(BUILTIN_TEMPLATES)),
    chat=conversations(),
    supervise=st.sampled_from(["responses", "all"]),
)
def test_the_built_in_templates_supervise_each_answer_with_its_end(tokenizer, name, chat, supervise):
    tokenizer = copy.deepcopy(tokenizer)
    builtin = BUILTIN_TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(builtin.special_tokens)})
    end = builtin.stop_token or tokenizer.eos_token
    [document], _ = Encoder(tokenizer, chat_template=name, supervise=supervise).encode([Row(chat, origin="x:1")])
    asked = [message["role"] for message in chat].index("user") if any(m["role"] == "user" for m in chat) else len(chat)
    answers = [i for i, message in enumerate(chat) if message["role"] == "assistant" and i > asked]
    kept = chat[: answers[-1] + 1] if answers and supervise == "responses" else chat
    text = tokenizer.apply_chat_template(kept, chat_template=builtin.text, tokenize=False)
    assert tokenizer.decode(document.input_ids) == text
    assert document.labels[0] == -100
    if supervise == "all":
        assert document.labels[1:] == document.input_ids[1:]
        return
    space = " " if name == "plain" else ""  # its generation prompt ends before the space
    contents = [chat[i]["content"] for i in answers]
    assert runs_of(tokenizer, document) == [space + content.removesuffix(end) + end for content in contents]
