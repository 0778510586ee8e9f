"""`builtin:demo` -> files: a small Llama with random weights, its tokenizer, and instruction data."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from truetune.cache import cache_directory
from truetune.data.errors import DataError
from truetune.demo import data

BUILTIN = "builtin:demo"
TRAIN_ROWS, HELD_OUT_ROWS = 6000, 400

SPECIAL_TOKENS = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def resolve_model(name: str) -> str:
    """The directory of the built-in model, made at its first use; any other name as it is."""
    return str(_cached("model", build_model)) if name == BUILTIN else name


def resolve_data(name: str, split: str = "train") -> str:
    """The file of the built-in data (split "train" or "held_out"), made at its first use; any other name as it is."""
    return str(_cached("data", build_data) / f"{split}.jsonl") if name == BUILTIN else name


def build_data(directory: Path) -> None:
    """Writes train.jsonl and held_out.jsonl: chats in `messages`, and the `task` of each. No question is in both."""
    examples = data.make_examples(TRAIN_ROWS + HELD_OUT_ROWS)
    parts = {"held_out": examples[:HELD_OUT_ROWS], "train": examples[HELD_OUT_ROWS:]}
    for name, part in parts.items():
        lines = [json.dumps({"messages": example.messages(), "task": example.task}) + "\n" for example in part]
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def build_model(directory: Path) -> None:
    """Writes a Llama of half a million random weights and a byte-level BPE tokenizer trained on the training rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(data.make_examples(TRAIN_ROWS + HELD_OUT_ROWS)[HELD_OUT_ROWS:])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        # Large weights and biases in attention: with the usual 0.02 the model learns nothing in ten times the steps.
        initializer_range=0.08,
        attention_bias=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer(examples: list[data.Example]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f" {example.question} {example.answer}" for example in examples), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _cached(name: str, build: Callable[[Path], None]) -> Path:
    """The directory that `build` fills, kept by the code that made it; written beside and renamed into place."""
    code = b"".join(Path(module).read_bytes() for module in (__file__, data.__file__))
    root = cache_directory()
    target = root / f"demo-{name}-{hashlib.sha256(code).hexdigest()[:12]}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as beside:  # gone, too, where an error or Ctrl-C ends the building
            built = Path(beside) / name
            built.mkdir()
            build(built)
            built.rename(target)
    except OSError as error:
        if not target.is_dir():  # else another process was quicker
            raise DataError(
                f"{BUILTIN} cannot be kept in {root} ({error.strerror or error}): set XDG_CACHE_HOME to a "
                "directory that can be written"
            ) from error
    return target
