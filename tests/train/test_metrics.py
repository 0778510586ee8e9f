"""Losses by kind of token: the parts of the whole."""

import pytest
import torch
from datasets import Dataset

from pairs import llama
from truetune import SFTConfig
from truetune.data.collate import collate_documents
from truetune.train.metrics import nll_by_kind
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
