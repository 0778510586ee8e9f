"""One small script, run with each library's two classes, and what came of it.

A table's row is `case(...)`: fields of `SFTConfig`, and a function of `Given` that returns arguments of `SFTTrainer`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset, IterableDataset
from packaging.version import Version

from pairs import SETTINGS, assert_same_metrics, llama

STREAMED_ROWS = 8


@dataclass
class Given:
    """What a script of one library starts from: nothing in it is shared with the other library's script."""

    library: ModuleType
    rows: list[dict]
    tokenizer: Any
    folder: Path
    saved_model: str

    @cached_property
    def data(self) -> Dataset:
        return Dataset.from_list([{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in self.rows])

    @cached_property
    def texts(self) -> Dataset:
        return Dataset.from_list([{"text": r["question"] + "\n" + r["answer"]} for r in self.rows])

    @cached_property
    def chats(self) -> Dataset:
        return Dataset.from_list([{"messages": [*asked(r), *answered(r)]} for r in self.rows])

    @cached_property
    def tokenized(self) -> Dataset:
        """Ids, and a mask of their last ten."""
        ids = self.tokenizer([r["question"] + "\n" + r["answer"] for r in self.rows])["input_ids"]
        return Dataset.from_list([{"input_ids": i, "mask": [0] * (len(i) - 10) + [1] * 10} for i in ids])

    def llama(self, **config):
        return llama(self.tokenizer, **config)

    def write(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text, encoding="utf-8")
        return str(self.folder / name)


def asked(row: dict) -> list[dict]:
    return [{"role": "user", "content": row["question"]}]


def answered(row: dict) -> list[dict]:
    return [{"role": "assistant", "content": row["answer"]}]


@dataclass(frozen=True)
class Case:
    arguments: Callable[[Given], dict]
    fields: dict[str, Any]
    needs: str = ""  # "trl 1.16": older versions skip


def case(arguments: Callable[[Given], dict] = lambda given: {}, *, needs: str = "", **fields) -> Case:
    """A field's value may be a function of `Given` as well."""
    return Case(arguments, fields, needs)


def skip_if_older(needs: str) -> None:
    package, _, least = needs.partition(" ")
    if package and Version(version(package)) < Version(least):
        pytest.skip(f"{package} {version(package)} does not have it: {least} does")


@dataclass
class Outcome:
    """`at`: the call that the script ended in, which is "end" where nothing was raised."""

    at: str = "config"
    error: Exception | None = None
    warned: list[str] = field(default_factory=list)
    trainer: Any = None
    result: Any = None


def run(given: Given, case: Case, act: Callable[[Any, Given], Any], caplog: pytest.LogCaptureFixture) -> Outcome:
    """Makes config and trainer and calls `act` with it. Errors are kept, and warnings as far as they are TRL's."""
    MultiProcessAdapter.warning_once.cache_clear()
    caplog.clear()
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _run(given, case, act, outcome)
        except Exception as error:
            outcome.error = error
    deprecations = [str(w.message) for w in caught if w.category is FutureWarning and "v2.0.0" in str(w.message)]
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("trl")]
    outcome.warned = sorted({*deprecations, *logged})
    return outcome


def _run(given: Given, case: Case, act: Callable, outcome: Outcome) -> None:
    fields = {name: value(given) if isinstance(value, FunctionType) else value for name, value in case.fields.items()}
    arguments = {"train_dataset": given.data, "processing_class": given.tokenizer, **case.arguments(given)}
    if arguments.get("eval_dataset") is not None:
        fields = {"eval_strategy": "steps", "eval_steps": 1, **fields}
    if "model" not in arguments:
        arguments["model"] = given.llama()
    if "args" not in arguments:
        arguments["args"] = given.library.SFTConfig(**{**SETTINGS, "output_dir": str(given.folder / "run"), **fields})
    outcome.at = "trainer"
    outcome.trainer = given.library.SFTTrainer(**arguments)
    outcome.at = "act"
    torch.manual_seed(0)
    outcome.result = act(outcome.trainer, given)
    outcome.at = "end"


# -- comparing


def assert_same_ending(ours: Outcome, theirs: Outcome) -> None:
    """The same call raises the same class of error in the same words, or none does; and both warn alike."""
    if theirs.error is None and ours.error is not None:
        raise ours.error
    assert ours.at == theirs.at, theirs.error
    assert isinstance(ours.error, type(theirs.error))
    if theirs.error is not None:
        assert str(ours.error).replace("truetune", "trl") == str(theirs.error)
    assert ours.warned == theirs.warned


def assert_same_run(ours: Outcome, theirs: Outcome) -> None:
    """The same ending, prepared rows, logs, and state of trainer, tokenizer and model configuration."""
    assert_same_ending(ours, theirs)
    assert theirs.error is None, f"TRL fails in {theirs.at}: {theirs.error}"
    a, b = ours.trainer, theirs.trainer
    assert contents(a.train_dataset) == contents(b.train_dataset)
    assert contents(a.eval_dataset) == contents(b.eval_dataset)
    assert len(a.state.log_history) == len(b.state.log_history)
    for entries in zip(a.state.log_history, b.state.log_history, strict=True):
        assert_same_metrics(*entries)
    for name in ("global_step", "epoch", "max_steps", "num_train_epochs", "logging_steps", "eval_steps"):
        assert getattr(a.state, name) == getattr(b.state, name), name
    assert what_it_encodes_with(a) == what_it_encodes_with(b)
    assert {n: p.shape for n, p in a.model.named_parameters()} == {n: p.shape for n, p in b.model.named_parameters()}
    assert [n for n, p in a.model.named_parameters() if p.requires_grad] == [
        n for n, p in b.model.named_parameters() if p.requires_grad
    ]


def contents(dataset: Any) -> Any:
    """Columns and rows; of a stream the first few."""
    if isinstance(dataset, dict):
        return {name: contents(part) for name, part in dataset.items()}
    if isinstance(dataset, IterableDataset):
        return list(dataset.take(STREAMED_ROWS))
    return dataset if dataset is None else (dataset.column_names, list(dataset.with_format(None)))


def what_it_encodes_with(trainer: Any) -> dict:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    config, generation = trainer.model.config, trainer.model.generation_config
    return {
        "tokens": (tokenizer.pad_token, tokenizer.eos_token, len(tokenizer), tokenizer.padding_side),
        "chat_template": (tokenizer.chat_template, trainer.chat_template),
        "config": (config.pad_token_id, config.eos_token_id, config.vocab_size, config.use_cache),
        "generation": (generation.pad_token_id, generation.eos_token_id),
        "tags": sorted(trainer.model.model_tags or []),
    }


def train(trainer: Any, given: Given) -> Any:
    return trainer.train()
