"""What of a row is supervised: turns, raw text, BOS and EOS, and the edges between prompt and answer."""

from pathlib import Path

import pytest
import trl
from chats import CALL, TOOLS, answers, assistant, chat, trained, user, with_bos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from real_text import CHATML
from truetune.data.chat import Encoder
from truetune.data.rows import Row
from truetune.data.templates import template_text

QWEN3 = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"


@pytest.fixture(scope="module")
def spaced_tokenizer(gsm8k_rows):
    """A BPE tokenizer in the manner of Llama 2, which puts a space in front of a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([row["question"] for row in gsm8k_rows[:300]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=template_text("plain"))


# ---- chats -----------------------------------------------------------------------------------------------------------


def test_every_gsm8k_answer_is_supervised_whole_with_its_terminator(tokenizer, gsm8k_rows):
    rows = [chat(user(row["question"]), assistant(row["answer"])) for row in gsm8k_rows[:500]]
    documents, counts = Encoder(tokenizer).encode(rows, first_row=7)
    assert not counts
    assert [document.row for document in documents] == list(range(7, 507))
    for document, row in zip(documents, rows, strict=True):
        assert document.input_ids == tokenizer.apply_chat_template(row.messages)["input_ids"]
        assert answers(tokenizer, document) == [row.messages[1]["content"] + "<|im_end|>"]
        assert document.labels[-1] == -100  # the line break behind <|im_end|>


def test_supervise_chooses_the_turns(tokenizer):
    row = chat(user("2+2?"), assistant("4"), user("3+3?"), assistant("6"), user("Thanks"))
    assert trained(tokenizer, row)[0] == [["4<|im_end|>", "6<|im_end|>"]]
    assert trained(tokenizer, row, supervise="last_response")[0] == [["6<|im_end|>"]]
    [document], _ = Encoder(tokenizer, supervise="all").encode([row])
    assert document.input_ids == tokenizer.apply_chat_template(row.messages)["input_ids"]
    assert document.labels == [-100, *document.input_ids[1:]]


def test_what_follows_the_last_supervised_turn_is_cut(tokenizer):
    [document], _ = Encoder(tokenizer).encode([chat(user("2+2?"), assistant("4"), user("Thanks"))])
    assert "Thanks" not in tokenizer.decode(document.input_ids)


def test_messages_of_the_prompt_are_not_supervised(tokenizer):
    row = chat(user("2+2?"), assistant("4"), user("3+3?"), assistant("6"), first_supervised=3)
    assert trained(tokenizer, row)[0] == [["6<|im_end|>"]]


def test_a_prompt_that_ends_in_the_assistants_turn_is_continued(tokenizer):
    row = chat(user("2+2?"), assistant("The sum is"), assistant(" 4."), first_supervised=2)
    [document], _ = Encoder(tokenizer).encode([row])
    assert tokenizer.decode(document.input_ids).endswith("<|im_start|>assistant\nThe sum is 4.<|im_end|>\n")
    assert answers(tokenizer, document) == [" 4.<|im_end|>"]


def test_consecutive_assistant_turns_are_each_supervised(tokenizer):
    row = chat(user("Count."), assistant("One."), assistant("Two."))
    assert trained(tokenizer, row)[0] == [["One.<|im_end|>", "Two.<|im_end|>"]]


def test_a_turn_before_the_first_user_is_not_supervised(tokenizer):
    row = chat(assistant("Hello!"), user("2+2?"), assistant("4"))
    texts, counts = trained(tokenizer, row)
    assert texts == [["4<|im_end|>"]]
    assert counts["opening_turns_unsupervised"] == 1


def test_a_turn_behind_a_prompt_without_a_user_is_supervised(tokenizer):
    system = {"role": "system", "content": "Greet."}
    assert trained(tokenizer, chat(system, assistant("Hello!"), first_supervised=1))[0] == [["Hello!<|im_end|>"]]
    assert trained(tokenizer, chat(system, assistant("Hello!")))[0] == [[]]


def test_a_chat_without_an_answer_gives_a_document_without_labels(tokenizer):
    [document], _ = Encoder(tokenizer).encode([chat(user("2+2?"))])
    assert set(document.labels) == {-100}
    assert len(document.labels) == len(document.input_ids) > 0


def test_supervision_stops_at_the_first_terminator(tokenizer):
    row = chat(user("2+2?"), assistant("4<|im_end|>"))
    assert trained(tokenizer, row)[0] == [["4<|im_end|>"]]


def test_reasoning_and_tool_calls_that_the_template_leaves_out_are_counted(tokenizer):
    row = chat(
        user("2+3?"),
        assistant(None, tool_calls=[CALL]),
        {"role": "tool", "content": "5"},
        assistant("5", reasoning_content="The tool says so."),
        tools=TOOLS,
    )
    texts, counts = trained(tokenizer, row)
    assert texts == [["5<|im_end|>"]]  # and not an empty answer in place of the call
    assert counts == {"tools_ignored": 1, "tool_calls_ignored": 1, "thinking_ignored": 1}


def test_an_empty_thinking_block_is_supervised_and_counted_unless_the_prompt_has_it(tokenizer):
    tokenizer.chat_template = QWEN3.read_text(encoding="utf-8")
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    texts, counts = trained(tokenizer, chat(*messages))
    assert texts == [["<think>\n\n</think>\n\n4<|im_end|>"], ["<think>\n\n</think>\n\n6<|im_end|>"]]
    assert counts == {"empty_think_supervised": 2, "unrolled_conversations": 1, "unrolled_documents": 2}
    texts, counts = trained(tokenizer, chat(*messages, template_kwargs={"enable_thinking": False}))
    assert texts == [["4<|im_end|>"], ["6<|im_end|>"]]
    assert counts == {"unrolled_conversations": 1, "unrolled_documents": 2}


def test_reasoning_is_not_supervised_behind_a_prompt_that_was_told_not_to_think(tokenizer):
    tokenizer.chat_template = QWEN3.read_text(encoding="utf-8")
    row = chat(user("2+2?"), assistant("4", reasoning_content="Easy."), template_kwargs={"enable_thinking": False})
    texts, counts = trained(tokenizer, row)
    assert texts == [["4<|im_end|>"]]
    assert counts == {"thinking_ignored": 1}


def test_unrolling_gives_as_few_documents_as_hold_every_turn_as_at_inference(tokenizer):
    tokenizer.chat_template = QWEN3.read_text(encoding="utf-8")
    call = assistant("", tool_calls=[CALL], reasoning_content="Call.")
    result = {"role": "tool", "content": "5"}
    think = {"reasoning_content": "Easy."}
    row = chat(user("2+2?"), assistant("4", **think), user("2+3?"), call, result, assistant("5", **think))
    texts, counts = trained(tokenizer, row)
    # Qwen3 drops thinking before the last question, so the call and the answer after it share a document.
    assert [len(document) for document in texts] == [1, 2]
    assert counts == {"unrolled_conversations": 1, "unrolled_documents": 2}


def test_without_a_terminator_in_the_template_every_answer_ends_with_eos(tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    row = chat(user("2+2?"), assistant("4"), user("3+3?"), assistant("6"))
    texts, counts = trained(tokenizer, row, chat_template=template)
    assert texts == [[" 4<|im_end|>"], [" 6<|im_end|>"]]  # EOS is not in the history: each turn for itself
    assert counts == {"eos_appended": 2, "unrolled_conversations": 1, "unrolled_documents": 2}
    tokenizer.eos_token = None
    texts, counts = trained(tokenizer, row, chat_template=template)
    assert texts == [[" 4", " 6"]]
    assert counts == {"turns_without_end": 2}


# ---- BOS, EOS and raw text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_tokenizer", [False, True])
@pytest.mark.parametrize("by_template", [False, True])
def test_chats_have_one_bos_where_template_or_tokenizer_puts_one(tokenizer, by_template, by_tokenizer):
    with_bos(tokenizer, by_tokenizer)
    template = "{{ bos_token }}" * by_template + CHATML
    row = chat(user("2+2?"), assistant("4"))
    [document], _ = Encoder(tokenizer, chat_template=template).encode([row])
    assert document.input_ids[0] == tokenizer.convert_tokens_to_ids(
        "<s>" if by_template or by_tokenizer else "<|im_start|>"
    )
    assert document.input_ids.count(tokenizer.bos_token_id) == (by_template or by_tokenizer)
    assert answers(tokenizer, document) == ["4<|im_end|>"]


@pytest.mark.parametrize("by_tokenizer", [False, True])
@pytest.mark.parametrize("written", ["", "<s>"])
def test_raw_text_has_one_bos_where_text_or_tokenizer_puts_one(tokenizer, written, by_tokenizer):
    with_bos(tokenizer, by_tokenizer)
    [document], _ = Encoder(tokenizer).encode([Row(completion=f"{written}Four apples.")])
    assert document.input_ids.count(tokenizer.bos_token_id) == (bool(written) or by_tokenizer)
    assert document.labels == [-100, *document.input_ids[1:]]


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_a_completion_is_supervised_up_to_one_eos(tokenizer, end):
    row = Row(prompt="How many apples?\n", completion=f"Four apples.{end}")
    assert trained(tokenizer, row)[0] == [["Four apples.<|im_end|>"]]
    [document], _ = Encoder(tokenizer, supervise="all").encode([row])
    assert document.labels == [-100, *document.input_ids[1:]]


def test_plain_text_is_supervised_but_for_its_first_token(tokenizer):
    [document], _ = Encoder(tokenizer).encode([Row(completion="Four apples.")])
    assert tokenizer.decode(document.input_ids) == "Four apples.<|im_end|>"
    assert document.labels == [-100, *document.input_ids[1:]]


def test_rows_of_both_kinds_keep_their_order(tokenizer):
    rows = [Row(completion="One."), chat(user("2+2?"), assistant("4")), Row(prompt="Two", completion=" three.")]
    documents, _ = Encoder(tokenizer).encode(rows)
    assert [document.row for document in documents] == [0, 1, 2]
    texts = [answers(tokenizer, document) for document in documents]
    assert texts[1:] == [["4<|im_end|>"], [" three.<|im_end|>"]]


# ---- the edge between prompt and answer ------------------------------------------------------------------------------


def test_ids_before_an_answer_are_those_of_the_prompt_alone(tokenizer):
    row = Row(prompt="The answer is 4", completion="2 apples.")
    encoder = Encoder(tokenizer)
    [document], counts = encoder.encode([row])
    merged = tokenizer.encode("The answer is 42 apples.")
    assert document.input_ids[:-1] != merged  # the test has a token to split: "42"
    prompt = tokenizer.encode(row.prompt)
    assert document.input_ids[: len(prompt)] == prompt
    assert answers(tokenizer, document) == ["2 apples.<|im_end|>"]
    assert not counts


def test_a_token_across_the_edge_is_unsupervised_where_text_cannot_be_cut(spaced_tokenizer):
    joint = spaced_tokenizer.encode("How many")
    assert spaced_tokenizer.encode("How") + spaced_tokenizer.encode(" many") != joint
    [document], counts = Encoder(spaced_tokenizer).encode([Row(prompt="How m", completion="any")])
    assert document.input_ids == [*joint, spaced_tokenizer.eos_token_id]
    assert document.labels == [-100] * len(joint) + [spaced_tokenizer.eos_token_id]
    assert counts == {"boundary_merged": 1}


def test_tokenizers_that_add_a_space_keep_their_tokens_and_supervise_the_answer(spaced_tokenizer, gsm8k_rows):
    rows = [chat(user(row["question"]), assistant(row["question"])) for row in gsm8k_rows[:50]]
    documents, counts = Encoder(spaced_tokenizer).encode(rows)
    assert not counts
    for document, row in zip(documents, rows, strict=True):
        assert document.input_ids == spaced_tokenizer.apply_chat_template(row.messages)["input_ids"]
        text = row.messages[1]["content"]
        assert [answer.strip() for answer in answers(spaced_tokenizer, document)] == [f"{text}</s>"]


def test_tokenizing_whole_or_in_pieces_gives_the_same_where_no_token_crosses_an_edge(tokenizer, gsm8k_rows):
    rows = [chat(user(r["question"]), assistant(r["answer"]), user("?"), assistant("4")) for r in gsm8k_rows[:20]]
    encoder = Encoder(tokenizer)
    in_pieces = encoder.encode(rows)
    encoder._in_pieces = False
    assert encoder.encode(rows) == in_pieces


def test_special_tokens_that_swallow_white_space_leave_prompts_as_at_inference(tokenizer):
    from transformers import AddedToken

    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
    )
    tokens = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("user", "assistant", "end")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    messages = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6")]
    [document], counts = Encoder(tokenizer).encode([chat(*messages)])
    assert not counts
    assert document.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    assert answers(tokenizer, document) == ["4<|end|>", "6<|end|>"]
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert document.input_ids[: len(prompt)] == prompt


def test_tokenizers_in_python_supervise_the_same_text(gsm8k_rows):
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(chat_template=template_text("plain"))
    assert not tokenizer.is_fast
    for row in gsm8k_rows[:5]:
        given = chat(user(row["question"]), assistant(row["answer"]), user("Sure?"), assistant("Yes."))
        [document], counts = Encoder(tokenizer).encode([given])
        assert answers(tokenizer, document) == [f" {row['answer']}</s>", " Yes.</s>"]
        assert not counts
    # A special token that the edge cuts in two.
    [document], counts = Encoder(tokenizer).encode([Row(prompt="Four</", completion="s>apples")])
    assert answers(tokenizer, document) == ["apples</s>"]
    assert counts == {"boundary_merged": 1}


def test_truncation_and_padding_left_in_the_tokenizer_change_nothing(tokenizer):
    row = chat(user("2+2?"), assistant("It is four, as everybody knows."))
    encoder = Encoder(tokenizer)
    expected = encoder.encode([row])
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    assert encoder.encode([row]) == expected


TEXT = st.text(st.sampled_from("a1 \n\t.é漢<|>"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_any_content_is_supervised_exactly_and_behind_its_prompt(tokenizer, turns):
    messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
    [document], _ = Encoder(tokenizer).encode([chat(*messages)])
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert answers(tokenizer, document) == [f"{answer}<|im_end|>" for _, answer in turns]
    first = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert document.input_ids[: len(first)] == first


# ---- fingerprint -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_everything_that_decides_the_documents(tokenizer):
    import copy

    first = Encoder(tokenizer).fingerprint
    assert Encoder(copy.deepcopy(tokenizer)).fingerprint == first
    Encoder(tokenizer).encode([chat(user("2+2?"), assistant("4"))])
    assert Encoder(tokenizer).fingerprint == first  # encoding leaves no trace in it
    others = [Encoder(tokenizer, chat_template="plain"), Encoder(tokenizer, supervise="all")]
    for change in ({"bos_token": "<s>"}, {"eos_token": "<|endoftext|>"}, {"additional_special_tokens": ["<x>"]}):
        changed = copy.deepcopy(tokenizer)
        changed.add_special_tokens(change)
        others.append(Encoder(changed))
    assert len({first, *(encoder.fingerprint for encoder in others)}) == 6
