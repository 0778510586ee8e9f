"""The built-in data and model: what the demo's numbers stand on."""

from collections import Counter

import pytest

from truetune import demo
from truetune.data.errors import DataError
from truetune.demo import data
from truetune.demo.build import HELD_OUT_ROWS, TRAIN_ROWS, build_model, train_tokenizer
from truetune.demo.evaluate import Answer, answer, exact_match, read_questions


@pytest.fixture(scope="module")
def examples():
    return data.make_examples(TRAIN_ROWS + HELD_OUT_ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_there_are_several_thousand_rows_of_at_least_six_tasks(examples):
    assert TRAIN_ROWS >= 3000
    assert len({example.task for example in examples}) >= 6
    assert examples[:50] == data.make_examples(50)


def test_no_question_stands_twice_so_none_is_held_out_and_trained(examples):
    assert len({example.question for example in examples}) == len(examples)
    train, held_out = (read_questions(demo.resolve_data(demo.BUILTIN, split)) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (TRAIN_ROWS, HELD_OUT_ROWS)
    asked = {row["messages"][0]["content"] for row in train}
    assert not asked & {row["messages"][0]["content"] for row in held_out}


def test_the_best_constant_answer_of_each_task_scores_under_a_fifth(examples):
    for task in {example.task for example in examples}:
        answers = Counter(example.answer for example in examples if example.task == task)
        assert max(answers.values()) / sum(answers.values()) < 0.2, task


def test_the_tokenizer_gives_text_back_and_renders_chats(examples):
    tokenizer = train_tokenizer(examples[:500])
    for text in (examples[0].question, "Grüße, 你好!\n  2 + 2 = 4"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template(examples[0].messages(), return_dict=False)
    assert ids[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


def test_the_model_is_built_once_and_generates(tmp_path):
    from truetune.models.load import load_model, load_tokenizer

    path = demo.resolve_model(demo.BUILTIN)
    assert path == demo.resolve_model(demo.BUILTIN)
    model, tokenizer = load_model(path, precision="fp32"), load_tokenizer(path)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    build_model(tmp_path)
    again = load_model(str(tmp_path), precision="fp32")
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all((mine == other).all() for mine, other in weights)
    rows = read_questions(demo.resolve_data(demo.BUILTIN, "held_out"))[:6]
    answers = answer(model, tokenizer, rows, batch_size=4)
    assert [given.question for given in answers] == [row["messages"][0]["content"] for row in rows]
    assert exact_match(answers)["all"] == 0.0
    assert answers == answer(model, tokenizer, rows, batch_size=1)


def test_a_build_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def press_ctrl_c(count):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "make_examples", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        demo.resolve_data(demo.BUILTIN)
    assert list((tmp_path / "truetune").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/truetune \(Not a directory\): set XDG_CACHE_HOME"):
        demo.resolve_data(demo.BUILTIN)


def test_exact_match_counts_right_answers_by_task():
    answers = [Answer("a", "?", "x", "x"), Answer("a", "?", "x", "X"), Answer("b", "?", "y z", "y z")]
    assert exact_match(answers) == {"a": 0.5, "b": 1.0, "all": 2 / 3}


def test_the_held_out_file_holds_chats():
    row = read_questions(demo.resolve_data(demo.BUILTIN, "held_out"))[0]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert demo.resolve_data("chats.jsonl") == "chats.jsonl"
