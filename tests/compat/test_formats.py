"""Each format of data that TRL documents: the same columns and rows after preparation, and the same training."""

import json

import pytest
import trl
from datasets import Dataset, DatasetDict
from outcomes import Given, answered, asked, assert_same_run, case

TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiplies two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def template(given: Given, name: str) -> None:
    given.tokenizer.chat_template = getattr(trl.chat_template_utils, f"{name}_chat_template")


def each(of_row):
    """`of_row(row)` of every row as the training set."""
    return case(lambda given: {"train_dataset": Dataset.from_list([of_row(row) for row in given.rows])})


def called(given: Given, tools) -> dict:
    """Chats in which a tool is called and answers."""
    template(given, "qwen3")
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 2, "b": 3}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "6"},
    ]
    rows = [{"messages": [*asked(r), *turns, *answered(r)], "tools": tools} for r in given.rows]
    return {"train_dataset": Dataset.from_list(rows)}


def thinking(given: Given) -> dict:
    template(given, "qwen3")
    settings = [{"enable_thinking": False}, {"enable_thinking": True}]
    rows = [
        {"prompt": asked(r), "completion": answered(r), "chat_template_kwargs": settings[i % 2]}
        for i, r in enumerate(given.rows)
    ]
    return {"train_dataset": Dataset.from_list(rows)}


def ids(given: Given, mask: str | None = None) -> Dataset:
    return given.tokenized.rename_column("mask", mask) if mask else given.tokenized.remove_columns("mask")


def labelled(given: Given) -> Dataset:
    def of_mask(row):
        return {"labels": [i if kept else -100 for i, kept in zip(row["input_ids"], row["mask"], strict=True)]}

    return given.tokenized.map(of_mask, remove_columns="mask")


def both_masks(given: Given) -> Dataset:
    return ids(given, "assistant_masks").map(lambda row: {"completion_mask": [0] + [1] * (len(row["input_ids"]) - 1)})


def four_ids(rows: dict) -> dict:
    return {"input_ids": [[5, 6, 7, 8] for _ in rows["text"]]}


def streamed(dataset: Dataset):
    return dataset.select(range(5)).to_iterable_dataset()


FORMATS = {
    # text and conversations
    "text": each(lambda r: {"text": r["question"] + "\n" + r["answer"]}),
    "text that ends in EOS": each(lambda r: {"text": r["answer"] + "<|im_end|>"}),
    "text and columns of other names": each(lambda r: {"source": "gsm8k", "text": r["question"], "length": 3}),
    "prompt and completion": each(lambda r: {"prompt": r["question"] + "\n", "completion": r["answer"]}),
    "prompt and completion that share a token": each(
        lambda r: {"prompt": r["question"][:-3], "completion": r["question"][-3:] + r["answer"]}
    ),
    "completion that ends in EOS": each(lambda r: {"prompt": r["question"], "completion": r["answer"] + "<|im_end|>"}),
    "empty prompt": each(lambda r: {"prompt": "", "completion": r["answer"]}),
    "messages": each(lambda r: {"messages": asked(r) + answered(r)}),
    "messages with a system prompt": each(
        lambda r: {"messages": [{"role": "system", "content": "Be brief."}, *asked(r), *answered(r)]}
    ),
    "messages of many turns": each(
        lambda r: {"messages": [*asked(r), *answered(r), {"role": "user", "content": "Sure?"}, *answered(r)]}
    ),
    "conversational prompt and completion": each(lambda r: {"prompt": asked(r), "completion": answered(r)}),
    "conversations, from and value": each(
        lambda r: {
            "conversations": [
                {"from": "user", "value": r["question"]},
                {"from": "assistant", "value": r["answer"]},
            ]
        }
    ),
    "tools": case(lambda given: called(given, [TOOL])),
    "tools as JSON": case(lambda given: called(given, json.dumps([TOOL]))),
    "tools, assistant_only_loss": case(lambda given: called(given, [TOOL]), assistant_only_loss=True, max_length=None),
    "chat_template_kwargs": case(thinking, max_length=None),
    "a known template that assistant_only_loss completes": case(
        lambda given: (template(given, "qwen2_5"), {"train_dataset": given.chats})[1], assistant_only_loss=True
    ),
    # tokenized
    "input_ids": case(lambda given: {"train_dataset": ids(given)}),
    "input_ids and labels": case(lambda given: {"train_dataset": labelled(given)}),
    "input_ids and labels, packed": case(lambda given: {"train_dataset": labelled(given)}, packing=True),
    "input_ids and labels, padding-free": case(
        lambda given: {"train_dataset": labelled(given)}, padding_free=True, max_length=None
    ),
    "input_ids and completion_mask": case(
        lambda given: {"train_dataset": ids(given, "completion_mask")}, completion_only_loss=True
    ),
    "input_ids and a completion_mask not asked for": case(
        lambda given: {"train_dataset": ids(given, "completion_mask")}
    ),
    "input_ids and assistant_masks": case(lambda given: {"train_dataset": ids(given, "assistant_masks")}),
    "input_ids and both masks": case(lambda given: {"train_dataset": both_masks(given)}, completion_only_loss=True),
    "input_ids and attention_mask": case(
        lambda given: {"train_dataset": ids(given).map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})}
    ),
    "input_ids as torch tensors": case(lambda given: {"train_dataset": ids(given).with_format("torch")}),
    "rows that truncation leaves without a label": case(
        lambda given: {"train_dataset": labelled(given)}, max_length=60
    ),
    "rows that are prepared already": case(
        lambda given: {"train_dataset": labelled(given)}, dataset_kwargs={"skip_prepare_dataset": True}
    ),
    "with_transform, not prepared": case(
        lambda given: {"train_dataset": given.texts.with_transform(four_ids)},
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    ),
    # formatting_func
    "formatting_func": case(
        lambda given: {"formatting_func": lambda row: row["prompt"] + row["completion"]}, completion_only_loss=False
    ),
    "formatting_func of other columns": case(
        lambda given: {
            "train_dataset": Dataset.from_list(given.rows),
            "formatting_func": lambda row: f"Q: {row['question']}\nA: {row['answer']}",
        }
    ),
    "formatting_func of messages": case(
        lambda given: {"train_dataset": given.chats, "formatting_func": lambda row: row["messages"][1]["content"]}
    ),
    "formatting_func beside input_ids": case(
        lambda given: {"train_dataset": ids(given), "formatting_func": lambda row: "never called"}
    ),
    # streams
    "a stream of text": case(lambda given: {"train_dataset": given.texts.to_iterable_dataset()}),
    "a stream of prompt and completion": case(lambda given: {"train_dataset": given.data.to_iterable_dataset()}),
    "a stream of messages": case(lambda given: {"train_dataset": given.chats.to_iterable_dataset()}),
    "a stream of input_ids": case(lambda given: {"train_dataset": labelled(given).to_iterable_dataset()}),
    "a packed stream": case(lambda given: {"train_dataset": given.chats.to_iterable_dataset()}, packing=True),
    "a shuffled stream": case(lambda given: {"train_dataset": given.texts.to_iterable_dataset()}, shuffle_dataset=True),
    "a stream with dispatch_batches": case(
        lambda given: {"train_dataset": given.texts.to_iterable_dataset()},
        accelerator_config={"dispatch_batches": True},
    ),
    # evaluation sets
    "an evaluation set of another format": case(lambda given: {"eval_dataset": given.chats.select(range(5))}),
    "a dict of evaluation sets": case(
        lambda given: {"eval_dataset": {"short": given.data.select(range(2)), "chats": given.chats.select(range(3))}}
    ),
    "a DatasetDict of evaluation sets": case(
        lambda given: {"eval_dataset": DatasetDict(test=given.data.select(range(3)), dev=given.data.select(range(2)))}
    ),
    "a streamed evaluation set": case(lambda given: {"eval_dataset": streamed(given.data)}),
    "a streamed evaluation set beside packs": case(
        lambda given: {"train_dataset": given.chats.to_iterable_dataset(), "eval_dataset": streamed(given.data)},
        packing=True,
    ),
    "an evaluation set of one row": case(lambda given: {"eval_dataset": given.data.select(range(1))}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_prepared_and_trains_as_in_trl(name, run_both):
    ours, theirs = run_both(FORMATS[name])
    assert_same_run(ours, theirs)
    assert sum("loss" in entry for entry in theirs.trainer.state.log_history) == 2
    assert ours.trainer.report.fused_losses > 0
    # Transformers counts a stream's rows by its batches, so those of an evaluation keep their rows.
    assert (ours.trainer.report.padded_batches == 0) == (name != "a streamed evaluation set")
