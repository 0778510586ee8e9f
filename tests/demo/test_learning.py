"""The built-in model learns the built-in data by a user's own way, and nothing but reading helps it."""

import re
from collections import Counter

import pytest

from truetune import demo, run
from truetune.demo import data
from truetune.demo.evaluate import read_questions
from truetune.models.load import load_model, load_tokenizer
from truetune.recipe import load_recipe
from truetune.run_demo import SETTINGS

LORA = ("method=lora", *(setting for setting in SETTINGS if not setting.startswith("method=")))
WORDINGS = {task.__name__: wordings for task, wordings in data.TASKS.items()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def facts_of(row: dict) -> tuple:
    """What a row's question asks about, whatever its wording."""
    question = row["messages"][0]["content"]
    for wording in WORDINGS[row["task"]]:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(wording))
        if match := re.fullmatch(pattern, question):
            return (row["task"], *sorted(match.groupdict().items()))
    raise AssertionError(f"no wording of {row['task']} gives {question!r}")


def test_what_is_held_out_is_trained_in_no_other_wording():
    train, held_out = (read_questions(demo.resolve_data(demo.BUILTIN, split)) for split in ("train", "held_out"))
    assert not {facts_of(row) for row in train} & {facts_of(row) for row in held_out}


def test_no_constant_answer_scores_a_fifth_on_the_held_out_rows():
    answers: dict[str, Counter] = {}
    for row in read_questions(demo.resolve_data(demo.BUILTIN, "held_out")):
        answers.setdefault(row["task"], Counter())[row["messages"][1]["content"]] += 1
    assert set(answers) == set(WORDINGS)
    for task, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < 0.2, task


def test_generation_ends_with_the_turn():
    path = demo.resolve_model(demo.BUILTIN)
    model, tokenizer = load_model(path, precision="fp32"), load_tokenizer(path)
    question = [{"role": "user", "content": "Shout these words: seal otter."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    whole = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "SEAL OTTER"}], return_dict=False
    )
    assert whole[: prompt["input_ids"].shape[1]] == prompt["input_ids"][0].tolist()
    end = whole[-1]
    output = model.generate(**prompt, max_new_tokens=8, do_sample=False, sequence_bias=[[[end], 1e4]])
    assert output[0].tolist() == [*prompt["input_ids"][0].tolist(), end]


@pytest.mark.parametrize(
    ("settings", "highest"),
    [
        ((*SETTINGS, "training.max_steps=80"), 0.5),
        ((*LORA, "training.max_steps=30"), 0.8),
    ],
    ids=["full", "lora"],
)
def test_a_shortened_run_on_the_built_in_names_lowers_the_loss(tmp_path, settings, highest):
    """The last losses as a share of the first: full fine-tuning gets there fast, LoRA on random weights slowly."""
    flags = {"model": demo.BUILTIN, "data": demo.BUILTIN, "output_dir": str(tmp_path / "run")}
    result = run.train(load_recipe(None, settings, flags))
    assert result.trainer is not None
    losses = [line["loss"] for line in result.trainer.state.log_history if "loss" in line]
    assert sum(losses[-5:]) < highest * sum(losses[:5])
