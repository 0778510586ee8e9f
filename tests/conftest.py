"""Shared fixtures: real text, a real byte-level BPE tokenizer, and `make`: our trainer, or it and stock TRL's."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models, and two workers on two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1" if not os.path.exists("/dev/nvidiactl") else "0")

import json
import types
from importlib.metadata import version

import pytest
from packaging.version import Version

from commands import CHAT, write_rows
from real_text import CHATML, train_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def stock_trl_runs_on_a_cpu() -> None:
    if Version(version("trl")) < Version("1.16"):
        from stock_trl import use_plain_head_on_cpu

        use_plain_head_on_cpu()


@pytest.fixture(scope="session")
def gsm8k_path() -> Path:
    path = SHARED_DATA / "gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip(f"no real text at {path}")
    return path


@pytest.fixture(scope="session")
def gsm8k_rows(gsm8k_path) -> list[dict]:
    return [json.loads(line) for line in gsm8k_path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def _trained_tokenizer(gsm8k_rows):
    tokenizer = train_tokenizer(row["question"] + "\n" + row["answer"] for row in gsm8k_rows[:1000])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tokenizer(_trained_tokenizer):
    """A byte-level BPE tokenizer (2,000 tokens, trained on GSM8K) with a ChatML template; a fresh copy a test."""
    import copy

    return copy.deepcopy(_trained_tokenizer)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, _trained_tokenizer) -> Path:
    """A random Llama of 4 layers' hundred thousand weights, saved with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=_trained_tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    _trained_tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Path:
    """A directory, the current one, with a model `llama` and data `chats.jsonl` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").symlink_to(tiny_model)
    write_rows(tmp_path / "chats.jsonl", [CHAT] * 4)
    return tmp_path


# -- data sets and trainers; TRL is imported by those who use them


@pytest.fixture
def rows(gsm8k_rows):
    return [row for row in gsm8k_rows if len(row["question"]) + len(row["answer"]) < 300][:24]


@pytest.fixture
def data(rows):
    from datasets import Dataset

    return Dataset.from_list([{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows])


@pytest.fixture
def chats(rows):
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": row["question"]},
                    {"role": "assistant", "content": row["answer"]},
                ]
            }
            for row in rows
        ]
    )


@pytest.fixture
def make(tokenizer, data, tmp_path):
    """make(config fields, trainer arguments...) -> (our trainer, stock TRL's), on equal models."""
    import trl

    import truetune
    from pairs import SETTINGS, llama

    def make(fields=None, *, both=False, model=llama, peft=None, **keywords):
        settings = {**SETTINGS, "output_dir": str(tmp_path), **(fields or {})}
        arguments = {"train_dataset": data, "processing_class": tokenizer, **keywords}
        trainers = []
        for library in [truetune, trl] if both else [truetune]:
            made = model(tokenizer) if isinstance(model, types.FunctionType) else model
            trainers.append(
                library.SFTTrainer(model=made, args=library.SFTConfig(**settings), peft_config=peft, **arguments)
            )
        return trainers if both else trainers[0]

    return make
