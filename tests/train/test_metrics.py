"""Losses by kind of token: the parts of the whole."""

import pytest
import torch
from datasets import Dataset

from pairs import llama
from truetune import SFTConfig
from truetune.data.collate import collate_documents
from truetune.train.metrics import nll_by_kind, nll_by_source, source_names
from truetune.train.recipe_trainer import RecipeTrainer


def test_kinds_are_told_within_documents():
    documents = [
        {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, -100, 10]},  # a turn of two, one of one
        {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    ]
    batch = collate_documents(documents)
    nll = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    sums, counts = nll_by_kind(nll, batch["labels"][0], batch["loss_rows"])
    assert sums.tolist() == [1 + 4 + 8, 2 + 32, 16]
    assert counts.tolist() == [3, 2, 1]


def test_the_parts_are_the_loss(tokenizer, rows, tmp_path):
    def document(row):
        prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer(row["answer"])["input_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    documents = Dataset.from_list([document(row) for row in rows[:8]])
    args = SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                     logging_steps=1, bf16=False, use_cpu=True, report_to=[], save_strategy="no", max_length=512,
                     eval_strategy="steps", eval_steps=1, disable_tqdm=True)  # fmt: skip
    trainer = RecipeTrainer(llama(tokenizer), args, train_dataset=documents, eval_dataset=documents,
                            processing_class=tokenizer)  # fmt: skip
    trainer.train()
    supervised = sum(label != -100 for row in documents for label in row["labels"])
    lines = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(lines) == 2 and all("loss_rest" in entry for entry in trainer.state.log_history if "loss" in entry)
    for line in lines:
        first, last, rest = (line[f"eval_loss_{kind}"] for kind in ("first_token", "terminator", "rest"))
        whole = (8 * first + 8 * last + (supervised - 16) * rest) / supervised
        assert line["eval_loss"] == pytest.approx(whole, rel=1e-5)


# -- by source ---------------------------------------------------------------------------------------------------------


def test_sources_are_told_by_document():
    documents = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]},
        {"input_ids": [5, 6], "labels": [-100, 6]},
    ]
    batch = collate_documents(documents)
    source_T = torch.tensor([2] * 3 + [0] * 4 + [2] * 2)
    sums, counts = nll_by_source(torch.tensor([1.0, 2.0, 4.0, 8.0]), source_T, batch["loss_rows"], 3)
    assert sums.tolist() == [4, 0, 1 + 2 + 8]
    assert counts.tolist() == [1, 0, 3]


def test_names_of_sources_are_short_and_all_different():
    paths = [
        "/data/a/chats.jsonl",
        "/data/b/chats.parquet",
        "org/my set",
        "/data/a/chats.jsonl (2)",
        "/x/*.jsonl",
        "/d/",
    ]
    assert source_names(paths) == ["chats", "chats_2", "my_set", "chats_3", "data", "d"]
    assert source_names(["a", "a_2", "a"]) == ["a", "a_2", "a_3"]


def source_trainer(tokenizer, rows, path, paths, sources=("/data/sums.jsonl", "/data/texts.jsonl"), **fields):
    """Documents of `paths[i]` for `rows[i]`, in one trainer."""

    def document(row, source):
        prompt, answer = tokenizer(row["question"])["input_ids"], tokenizer(row["answer"])["input_ids"]
        prompt = prompt if source else []
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + [-100] * (not source) +
                answer[not source :], "source": source}  # fmt: skip

    documents = Dataset.from_list([document(row, source) for row, source in zip(rows, paths, strict=True)])
    args = SFTConfig(str(path), per_device_train_batch_size=2, logging_steps=1, bf16=False, use_cpu=True, report_to=[],
                     save_strategy="no", max_length=512, disable_tqdm=True, preflight="off",
                     **{"max_steps": 2, "gradient_accumulation_steps": 2, **fields})  # fmt: skip
    return RecipeTrainer(llama(tokenizer), args, train_dataset=documents, eval_dataset=documents, sources=sources,
                         eval_sources=sources, processing_class=tokenizer)  # fmt: skip


def test_each_source_has_the_loss_of_its_documents_alone(tokenizer, rows, tmp_path):
    mixed = source_trainer(tokenizer, rows[:8], tmp_path, [0, 1, 1, 0, 1, 0, 0, 1])
    together = mixed.evaluate()
    for source, name in enumerate(("sums", "texts")):
        chosen = [row for row, of in zip(rows[:8], [0, 1, 1, 0, 1, 0, 0, 1], strict=True) if of == source]
        alone = source_trainer(tokenizer, chosen, tmp_path, [source] * 4, sources=()).evaluate()
        logged = mixed.state.log_history[-1][f"eval_loss_source_{name}"]
        assert logged == pytest.approx(alone["eval_loss"], rel=1e-5)
        assert not [key for key in alone if "source" in key]
    assert together["eval_loss"] == pytest.approx(mixed.state.log_history[-1]["eval_loss"])


def test_the_losses_of_sources_are_parts_of_the_training_loss(tokenizer, rows, tmp_path):
    """One step a log that holds all documents: the supervised tokens of each source are known."""
    paths = [0, 1, 1, 0, 1, 0, 0, 1]
    losses = []
    for sources in (("/data/sums.jsonl", "/data/texts.jsonl"), ()):
        trainer = source_trainer(tokenizer, rows[:8], tmp_path, paths, sources, gradient_accumulation_steps=8)
        trainer.train()
        losses.append([entry for entry in trainer.state.log_history if "loss" in entry])
    assert [entry["loss"] for entry in losses[0]] == [entry["loss"] for entry in losses[1]]
    counts = [0, 0]
    for row in trainer.train_dataset:
        counts[row["source"]] += sum(label != -100 for label in row["labels"])
    for entry in losses[0]:
        whole = (counts[0] * entry["loss_source_sums"] + counts[1] * entry["loss_source_texts"]) / sum(counts)
        assert entry["loss"] == pytest.approx(whole, rel=1e-4)


def test_a_trial_of_a_batch_knows_no_sources(tokenizer, rows, tmp_path):
    trainer = source_trainer(tokenizer, rows[:8], tmp_path, [0, 1] * 4)
    assert "source" not in trainer.largest_batch() and "source" not in trainer.first_batch()
    assert "source" in next(iter(trainer.get_train_dataloader()))
