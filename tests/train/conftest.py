"""Real rows, and `make`: our trainer, or it and stock TRL's, on them."""

import types

import pytest
import trl
from datasets import Dataset
from pairs import llama

import truetune


@pytest.fixture
def rows(gsm8k_rows):
    return [row for row in gsm8k_rows if len(row["question"]) + len(row["answer"]) < 300][:24]


@pytest.fixture
def data(rows):
    return Dataset.from_list([{"prompt": row["question"] + "\n", "completion": row["answer"]} for row in rows])


@pytest.fixture
def chats(rows):
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

    def make(fields=None, *, both=False, model=llama, peft=None, **keywords):
        settings = {
            "output_dir": str(tmp_path),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_length": 96,
            **(fields or {}),
        }
        arguments = {"train_dataset": data, "processing_class": tokenizer, **keywords}
        trainers = []
        for library in [truetune, trl] if both else [truetune]:
            made = model(tokenizer) if isinstance(model, types.FunctionType) else model
            trainers.append(
                library.SFTTrainer(model=made, args=library.SFTConfig(**settings), peft_config=peft, **arguments)
            )
        return trainers if both else trainers[0]

    return make
