"""Chat templates: our own, the user's, and those that come from anywhere."""

from pathlib import Path

import pytest
import trl
from chats import CALL, TOOLS, assistant, chat, trained, user, with_bos

from real_text import CHATML
from truetune.data.chat import Encoder
from truetune.data.errors import DataError
from truetune.data.rows import Row
from truetune.data.templates import BUILTIN_TEMPLATES, template_text

QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


# ---- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_templates_end_answers_with_their_stop_token_and_never_unroll(tokenizer, name):
    builtin = BUILTIN_TEMPLATES[name]
    tokenizer.add_special_tokens({"additional_special_tokens": list(builtin.special_tokens)})
    end = builtin.stop_token or tokenizer.eos_token
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        texts, counts = trained(tokenizer, chat(*system, *messages), chat_template=name)
        assert [[text.strip() for text in document] for document in texts] == [[f"4{end}", f"6{end}"]]
        assert not counts


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_builtin_templates_begin_with_the_tokenizers_bos_if_it_has_one(tokenizer, name):
    row = chat(user("2+2?"), assistant("4"))
    with_bos(tokenizer, by_tokenizer=True)
    tokenizer.add_special_tokens({"additional_special_tokens": list(BUILTIN_TEMPLATES[name].special_tokens)})
    [document], _ = Encoder(tokenizer, chat_template=name).encode([row])
    rendered = tokenizer.apply_chat_template(row.messages, chat_template=template_text(name))["input_ids"]
    assert document.input_ids == rendered
    assert rendered.count(tokenizer.bos_token_id) == 1


def test_chatml_renders_tools_and_reasoning(tokenizer):
    row = chat(
        {"role": "system", "content": "Be brief."},
        user("2+3?"),
        assistant(None, tool_calls=[CALL], reasoning_content="Call it."),
        {"role": "tool", "content": "5"},
        assistant("5"),
        tools=TOOLS,
    )
    texts, counts = trained(tokenizer, row, chat_template="chatml")
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
    assert texts == [[f"<think>\nCall it.\n</think>\n\n{call}<|im_end|>", "5<|im_end|>"]]
    assert not counts


def test_a_template_is_named_by_a_file_or_by_one_of_the_tokenizers_own(tokenizer, tmp_path):
    row = chat(user("2+2?"), assistant("4"))
    expected = Encoder(tokenizer).encode([row])
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "mine": CHATML}
    assert Encoder(tokenizer, chat_template=str(file)).encode([row]) == expected
    assert Encoder(tokenizer, chat_template="mine").encode([row]) == expected
    assert Encoder(tokenizer, chat_template=CHATML).encode([row]) == expected


def test_rows_with_tools_take_the_tokenizers_own_template_for_tools(tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": "TOOLS\n" + CHATML}
    rows = [chat(user("2+2?"), assistant("4")), chat(user("2+2?"), assistant("4"), tools=TOOLS)]
    documents, _ = Encoder(tokenizer).encode(rows)
    assert [tokenizer.decode(document.input_ids).startswith("TOOLS") for document in documents] == [False, True]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_chats_without_a_template_name_the_templates_to_choose(tokenizer):
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer)
    assert encoder.encode([Row(completion="Raw text needs none.")])[0]
    with pytest.raises(DataError, match=r"has no chat template .* chatml"):
        encoder.encode([chat(user("2+2?"), assistant("4"))])


def test_the_templates_own_message_and_the_place_are_in_the_error(tokenizer):
    template = "{{ raise_exception('Roles must alternate') if messages[0].role == messages[1].role }}" + CHATML
    with pytest.raises(DataError, match=r"^chats\.jsonl:1: .*\(Roles must alternate\)"):
        trained(tokenizer, chat(user("2+2?"), user("Well?"), assistant("4")), chat_template=template)


def test_a_turn_that_follows_from_another_generation_prompt_than_its_own_is_an_error(tokenizer):
    # The fourth message changes how the first is rendered, and every turn has a generation prompt of its own.
    template = "{% for m in messages %}{{ messages|length if messages|length > 2 }}{{ loop.index0 }}:{{ m.content }}"
    template += "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ messages|length }}:{% endif %}"
    row = chat(user("2+2?"), assistant("4"), user("3+3?"), assistant("6"))
    with pytest.raises(DataError, match=r"chats\.jsonl:1: message 4 cannot be supervised"):
        trained(tokenizer, row, chat_template=template)


def test_a_turn_that_does_not_follow_from_its_generation_prompt_is_an_error(tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}ASSISTANT> {% endif %}"
    with pytest.raises(
        DataError, match=r"chats\.jsonl:1: message 2 cannot be supervised.*'assistant: 4.*'ASSISTANT> '"
    ):
        trained(tokenizer, chat(user("2+2?"), assistant("4")), chat_template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", "'chatlm' is none of chatml, llama3, gemma, plain"),
        ("missing.jinja", "no file can be read"),
        ("latin1.jinja", "is not UTF-8"),
        ("{% for m in messages %}{{ m.content }}", "no valid Jinja"),
    ],
)
def test_an_unusable_template_is_one_sentence(tokenizer, tmp_path, monkeypatch, template, message):
    monkeypatch.chdir(tmp_path)
    Path("latin1.jinja").write_bytes("{# é #}".encode("latin-1"))
    with pytest.raises(DataError, match=message) as error:
        trained(tokenizer, chat(user("2+2?"), assistant("4")), chat_template=template)
    assert "\n" not in str(error.value)


def test_arguments_that_belong_to_the_renderer_are_refused(tokenizer):
    row = chat(user("2+2?"), assistant("4"), template_kwargs={"add_generation_prompt": True})
    with pytest.raises(DataError, match=r"^chats\.jsonl:1: .*add_generation_prompt"):
        trained(tokenizer, row)


# ---- templates from anywhere -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "time"),
        ("{{ 'a' * 10 ** 11 }}", "memory"),
        ("{% for m in messages|reverse %}{{ m.content }}{% endfor %}", "order"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_harms_is_refused(tokenizer, monkeypatch, template, reason):
    monkeypatch.setattr("truetune.data.limits.SECONDS", 0.3)
    with pytest.raises(DataError, match=reason):
        trained(tokenizer, chat(user("2+2?"), assistant("4")), chat_template=template)


def test_a_template_that_writes_the_question_as_the_answer_trains_nothing(tokenizer):
    template = CHATML.replace("m['content']", "messages[0]['content']")
    texts, counts = trained(tokenizer, chat(user("2+2?"), assistant("4")), chat_template=template)
    assert texts == [[]] and counts["turns_ignored"] == 1


def test_a_row_cannot_say_how_it_is_rendered(tokenizer):
    with pytest.raises(DataError, match="continue_final_message"):
        trained(tokenizer, chat(user("a"), assistant("b"), template_kwargs={"continue_final_message": True}))


def test_a_template_that_writes_nothing_gives_no_label(tokenizer):
    [document], _ = Encoder(tokenizer, chat_template="{{ '' }}").encode([chat(user("a"))])
    assert document.input_ids == document.labels == []
