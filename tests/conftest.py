"""Shared fixtures: real text, a real byte-level BPE tokenizer, small models of real classes."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models, and two workers on two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1" if not os.path.exists("/dev/nvidiactl") else "0")

import json

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def gsm8k_path() -> Path:
    path = SHARED_DATA / "gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip(f"no real text at {path}")
    return path


@pytest.fixture(scope="session")
def gsm8k_rows(gsm8k_path) -> list[dict]:
    return [json.loads(line) for line in gsm8k_path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), vocab_size=2000):
    """A byte-level BPE tokenizer trained on `texts`; the first special token is pad, the last is EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special_tokens[0], eos_token=special_tokens[-1]
    )


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
