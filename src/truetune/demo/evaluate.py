"""Exact match of greedy answers, by task."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    task: str
    question: str
    right: str
    given: str

    @property
    def is_right(self) -> bool:
        return self.given == self.right


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def answer(model: Any, tokenizer: Any, rows: list[dict[str, Any]], batch_size: int = 100) -> list[Answer]:
    """The model's greedy answer to each row's question, white space at its ends not counted."""
    was_training, padding_side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"  # apply_chat_template overlooks it as an argument
    answers = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        inputs = tokenizer.apply_chat_template(
            [row["messages"][:-1] for row in part],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        with torch.no_grad():
            outputs = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=16,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, text in zip(part, texts, strict=True):
            question, right = (message["content"] for message in row["messages"])
            answers.append(Answer(row["task"], question, right, text.strip()))
    model.train(was_training)
    tokenizer.padding_side = padding_side
    return answers


def exact_match(answers: list[Answer]) -> dict[str, float]:
    """The share of right answers by task, and over all under "all"."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for given in answers:
        for name in (given.task, "all"):
            asked[name] += 1
            right[name] += given.is_right
    return {name: right[name] / asked[name] for name in asked}
