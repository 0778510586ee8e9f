"""truetune's commands in this process, and the smallest data to give them."""

import json
from pathlib import Path

import pytest

from truetune.cli import main

CHAT = {"messages": [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]}
TRAIN = ("train", "--model", "llama", "--data", "chats.jsonl", "--output", "out")


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def save_adapter(place: Path, **changes) -> None:
    """`adapter`, made with r=4 on the model `llama`, its configuration changed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(place / "adapter")
    file = place / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def run(capfd, *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command in this process."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exited:
        main([str(word) for word in argv])
    out, err = capfd.readouterr()
    return exited.value.code, out, err
