"""Each way of giving `SFTTrainer` its model, adapter, tokenizer, collator, metrics, callbacks and optimizer."""

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from outcomes import assert_same_run, case
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
    TrainingArguments,
    get_constant_schedule_with_warmup,
)

from pairs import SETTINGS

LORA = {"r": 4, "target_modules": "all-linear", "task_type": TaskType.CAUSAL_LM}


def lora(**fields) -> LoraConfig:
    return LoraConfig(**{**LORA, **fields})


def few(given) -> Dataset:
    return given.data.select(range(5))


# -- what callers bring


class StopsAtTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **keywords):
        control.should_training_stop = state.global_step == 2


class EvaluatesWhenAsked(TrainerCallback):
    def on_step_end(self, args, state, control, **keywords):
        control.should_evaluate = control.should_log = state.global_step == 3


class HalvesGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **keywords):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class TextProcessor(ProcessorMixin):
    """A processor whose only part is a tokenizer."""

    attributes = ("tokenizer",)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, images=None, text=None, **settings):
        return self.tokenizer([text] if isinstance(text, str) else text, **settings)


def accuracy(prediction) -> dict:
    shifted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    best = shifted.argmax(-1) if shifted.ndim == 3 else shifted
    return {"accuracy": float(np.mean((best == labels)[labels != -100]))}


class AccuracyByBatch:
    def __init__(self) -> None:
        self.right, self.all = 0, 0

    def __call__(self, prediction, compute_result=False) -> dict:
        best, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        self.right += int((best == labels)[labels != -100].sum())
        self.all += int((labels != -100).sum())
        return {"right": self.right / self.all} if compute_result else {}


def pairs_of_ids(given) -> Dataset:
    ids = given.tokenizer([r["question"] + r["answer"] for r in given.rows])["input_ids"]
    return Dataset.from_list([{"input_ids": i[:64]} for i in ids])


def seq2seq_rows(given) -> Dataset:
    return pairs_of_ids(given).map(lambda row: {"labels": [-100] * 8 + row["input_ids"][8:]})


def with_optimizer(given, scheduled: bool) -> dict:
    model = given.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = get_constant_schedule_with_warmup(optimizer, num_warmup_steps=2) if scheduled else None
    return {"model": model, "optimizers": (optimizer, schedule)}


def adapted(given):
    torch.manual_seed(0)
    return get_peft_model(given.llama(), lora(init_lora_weights=False))


def without_pad_token(given) -> dict:
    given.tokenizer.pad_token = None
    return {}


def padded_left(given) -> dict:
    given.tokenizer.padding_side = "left"
    return {}


def cut_left(given) -> dict:
    given.tokenizer.truncation_side = "left"
    return {}


def arguments_of(given, config_class, **fields) -> dict:
    settings = {name: value for name, value in SETTINGS.items() if name != "max_length"}
    return {"args": config_class(**{**settings, "output_dir": str(given.folder / "run"), **fields})}


def frozen_but_the_head(given) -> dict:
    model = given.llama()
    model.model.requires_grad_(False)
    return {"model": model}


GIVEN = {
    # the model
    "a model's directory": case(lambda given: {"model": given.saved_model, "processing_class": None}),
    "a model's directory, adapter": case(lambda given: {"model": given.saved_model, "peft_config": lora()}),
    "a model in eval mode": case(lambda given: {"model": given.llama().eval()}),
    "a model with dropout": case(lambda given: {"model": given.llama(attention_dropout=0.0, attention_bias=True)}),
    "a model with tied embeddings": case(lambda given: {"model": given.llama(tie_word_embeddings=True)}),
    "a model most of which is frozen": case(frozen_but_the_head),
    "a model of eager attention": case(lambda given: {"model": given.llama(attn_implementation="eager")}),
    "a quantization_config beside a model": case(
        lambda given: {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    ),
    # adapters
    "peft_config": case(lambda given: {"peft_config": lora(), "eval_dataset": few(given)}, learning_rate=1e-2),
    "peft_config, no checkpointing": case(lambda given: {"peft_config": lora()}, gradient_checkpointing=False),
    "peft_config, modules_to_save": case(
        lambda given: {"peft_config": lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])},
        learning_rate=1e-2,
    ),
    "peft_config, some layers": case(
        lambda given: {"peft_config": lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])}
    ),
    "peft_config, ranks by pattern": case(
        lambda given: {"peft_config": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})}
    ),
    "peft_config, trained biases": case(
        lambda given: {"model": given.llama(attention_bias=True), "peft_config": lora(bias="all")}, learning_rate=1e-2
    ),
    "a PeftModel": case(lambda given: {"model": adapted(given)}, learning_rate=1e-2),
    "a PeftModel, packed": case(lambda given: {"model": adapted(given)}, packing=True, max_length=128),
    # the tokenizer
    "no pad token": case(without_pad_token),
    "padding_side left": case(padded_left),
    "truncation_side left": case(cut_left, max_length=48),
    "a processor": case(lambda given: {"processing_class": TextProcessor(given.tokenizer)}),
    "a processor, messages": case(
        lambda given: {"processing_class": TextProcessor(given.tokenizer), "train_dataset": given.chats}
    ),
    # the configuration
    "args of Transformers": case(lambda given: arguments_of(given, TrainingArguments)),
    "args of TRL": case(lambda given: arguments_of(given, trl.SFTConfig, max_length=64)),
    # the collator
    "TRL's collator": case(
        lambda given: {
            "data_collator": trl.trainer.sft_trainer.DataCollatorForLanguageModeling(
                pad_token_id=given.tokenizer.pad_token_id, pad_to_multiple_of=16
            )
        }
    ),
    "TRL's collator that returns position_ids": case(
        lambda given: {
            "data_collator": trl.trainer.sft_trainer.DataCollatorForLanguageModeling(
                pad_token_id=given.tokenizer.pad_token_id, return_position_ids=True
            )
        }
    ),
    "Transformers' collator": case(
        lambda given: {
            "train_dataset": pairs_of_ids(given),
            "data_collator": DataCollatorForLanguageModeling(given.tokenizer, mlm=False),
        },
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    "Transformers' collator for pairs": case(
        lambda given: {"train_dataset": seq2seq_rows(given), "data_collator": DataCollatorForSeq2Seq(given.tokenizer)}
    ),
    # metrics
    "compute_metrics": case(lambda given: {"compute_metrics": accuracy, "eval_dataset": few(given)}),
    "compute_metrics, several sets": case(
        lambda given: {"compute_metrics": accuracy, "eval_dataset": {"a": few(given), "b": few(given).select([1, 2])}}
    ),
    "compute_metrics, prediction_loss_only": case(
        lambda given: {"compute_metrics": accuracy, "eval_dataset": few(given)}, prediction_loss_only=True
    ),
    "compute_metrics, packed": case(
        lambda given: {"compute_metrics": accuracy, "eval_dataset": few(given)}, packing=True, max_length=128,
        per_device_eval_batch_size=1, eval_do_concat_batches=True,
    ),
    "preprocess_logits_for_metrics": case(
        lambda given: {
            "compute_metrics": accuracy,
            "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            "eval_dataset": few(given),
        }
    ),
    "batch_eval_metrics": case(
        lambda given: {"compute_metrics": AccuracyByBatch(), "eval_dataset": few(given)},
        batch_eval_metrics=True, eval_strategy="epoch", max_steps=-1, num_train_epochs=0.2,
    ),
    "compute_metrics of losses and inputs": case(
        lambda given: {
            "compute_metrics": lambda prediction: {"mean": float(prediction.losses.mean()), **accuracy(prediction)},
            "eval_dataset": few(given),
        },
        include_for_metrics=["loss", "inputs"],
    ),
    # callbacks
    "a callback's class": case(lambda given: {"callbacks": [PrinterCallback]}),
    "a callback that stops": case(lambda given: {"callbacks": [StopsAtTwo()]}, max_steps=5),
    "a callback that evaluates": case(
        lambda given: {"callbacks": [EvaluatesWhenAsked()], "eval_dataset": few(given)},
        max_steps=4, eval_strategy="no", logging_steps=10,
    ),
    "a callback that changes gradients": case(
        lambda given: {"callbacks": [HalvesGradients()]}, optim="sgd", learning_rate=0.5, max_grad_norm=0.0
    ),
    "early stopping": case(
        lambda given: {"callbacks": [EarlyStoppingCallback(1, 1.0)], "eval_dataset": few(given)},
        max_steps=6, metric_for_best_model="eval_loss", load_best_model_at_end=True,
        save_strategy="steps", save_steps=1,
    ),
    # optimizers
    "optimizers, one": case(lambda given: with_optimizer(given, scheduled=False), max_steps=3),
    "optimizers, with a schedule": case(lambda given: with_optimizer(given, scheduled=True), max_steps=3),
    "optimizer_cls_and_kwargs": case(
        lambda given: {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.05, "weight_decay": 0.1})}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_is_taken_as_in_trl(name, run_both):
    ours, theirs = run_both(GIVEN[name])
    assert_same_run(ours, theirs)
    assert theirs.trainer.state.global_step > 0
    assert ours.trainer.report.fused_losses > 0
    assert ours.trainer.report.padded_batches == 0
