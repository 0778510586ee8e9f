"""Each error that TRL raises: from truetune the same class and words, out of the same call."""

import pytest
import torch
import trl
from datasets import Dataset
from outcomes import asked, assert_same_ending, case
from peft import LoraConfig, get_peft_model

MASKED = {"skip_prepare_dataset": True}


def plain_ids(given) -> Dataset:
    return given.tokenized.rename_column("mask", "completion_mask")


def unknown_template(given) -> dict:
    given.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return {"train_dataset": given.chats}


def no_assistant(given) -> dict:
    given.tokenizer.chat_template = trl.chat_template_utils.qwen3_training_chat_template
    return {"train_dataset": Dataset.from_list([{"messages": asked(row)} for row in given.rows])}


def on(dataset: str):
    """A run on one of `Given`'s data sets."""
    return lambda given: {"train_dataset": getattr(given, dataset)}


ERRORS = {  # name: (case, the call, the class, a part of TRL's words)
    # the configuration
    "an unknown field": (case(max_lenght=3), "config", TypeError, "max_lenght"),
    "bf16 and fp16": (case(bf16=True, fp16=True), "config", ValueError, "At most one"),
    "an unknown scheduler": (case(lr_scheduler_type="linnear"), "config", ValueError, "linnear"),
    "load_best_model_at_end without evaluations": (
        case(load_best_model_at_end=True, save_strategy="steps"), "config", ValueError, "load_best_model"
    ),
    # data
    "no train_dataset": (case(lambda given: {"train_dataset": None}), "trainer", ValueError, "is required"),
    "a list of rows": (case(lambda given: {"train_dataset": given.rows}), "trainer", TypeError, "must be a `Dataset`"),
    "no known column": (
        case(lambda given: {"train_dataset": Dataset.from_list(given.rows)}), "trainer", KeyError, "text"
    ),
    "messages of from and value": (
        case(lambda given: {"train_dataset": Dataset.from_list(
            [{"messages": [{"from": "user", "value": row["question"]}]} for row in given.rows]
        )}), "act", ValueError, "No columns in the dataset match",
    ),
    "with_transform": (
        case(lambda given: {"train_dataset": given.texts.with_transform(lambda rows: rows)}),
        "trainer", ValueError, "with_transform",
    ),
    "images for a language model": (
        case(lambda given: {"train_dataset": given.texts.rename_column("text", "image")}),
        "trainer", ValueError, "vision-related",
    ),
    "masks that nothing reads": (
        case(lambda given: {"train_dataset": plain_ids(given)}, dataset_kwargs=MASKED),
        "trainer", ValueError, "mask columns but no 'labels'",
    ),
    "evaluation masks that nothing reads": (
        case(lambda given: {
            "train_dataset": given.tokenized.remove_columns("mask"), "eval_dataset": plain_ids(given)
        }, dataset_kwargs=MASKED), "trainer", ValueError, "The eval dataset has mask columns",
    ),
    "formatting_func and completions alone": (
        case(lambda given: {"formatting_func": lambda row: row["prompt"]}), "trainer", ValueError, "formatting function"
    ),
    "a stream without max_steps": (
        case(lambda given: {"train_dataset": given.texts.to_iterable_dataset()}, max_steps=-1),
        "trainer", ValueError, "max_steps",
    ),
    "evaluations without rows": (case(eval_strategy="steps"), "trainer", ValueError, "eval_dataset"),
    "an unknown truncation_mode": (
        case(truncation_mode="middle"), "trainer", ValueError, "Unsupported truncation mode: middle"
    ),
    # packing
    "packing without max_length": (case(packing=True, max_length=None), "trainer", ValueError, "can't be `None`"),
    "an unknown packing_strategy": (
        case(packing=True, packing_strategy="first_fit"), "trainer", ValueError, "Invalid packing strategy"
    ),
    "padding_free with max_length": (case(padding_free=True), "trainer", ValueError, "`max_length` is not enforced"),
    "padding_free and a collator": (
        case(lambda given: {"data_collator": lambda rows: rows}, padding_free=True, max_length=None),
        "trainer", ValueError, "custom data collator",
    ),
    "packing and a collator": (
        case(lambda given: {"data_collator": lambda rows: rows}, packing=True), "trainer", ValueError, "custom data"
    ),
    # tokens and templates
    "an unknown eos_token": (case(eos_token="<nowhere>"), "trainer", ValueError, "`eos_token` ('<nowhere>')"),
    "an unknown pad_token": (case(pad_token="<nowhere>"), "trainer", ValueError, "`pad_token` ('<nowhere>')"),
    "a processing_class that is none": (
        case(lambda given: {"processing_class": str.split}), "trainer", TypeError, "must be either"
    ),
    "assistant_only_loss of text": (
        case(on("texts"), assistant_only_loss=True), "trainer", ValueError, "not conversational"
    ),
    "assistant_only_loss, unknown template": (
        case(unknown_template, assistant_only_loss=True), "trainer", ValueError, "not training-compatible"
    ),
    "assistant_only_loss, nobody answers": (
        case(no_assistant, assistant_only_loss=True), "trainer", RuntimeError, "no assistant"
    ),
    "no chat template": (
        case(lambda given: (setattr(given.tokenizer, "chat_template", None), on("chats")(given))[1]),
        "trainer", ValueError, "chat_template",
    ),
    # the model and its adapter
    "a model that is nowhere": (
        case(lambda given: {"model": str(given.folder / "none")}), "trainer", OSError, ""
    ),
    "an unknown dtype": (
        case(lambda given: {"model": given.saved_model}, model_init_kwargs={"dtype": "float3"}),
        "trainer", ValueError, "Invalid `dtype`",
    ),
    "quantization asked for twice": (
        case(lambda given: {"model": given.saved_model, "quantization_config": object()},
             model_init_kwargs={"quantization_config": None}), "trainer", ValueError, "in only one place",
    ),
    "a router coefficient without experts": (
        case(router_aux_loss_coef=0.1), "trainer", ValueError, "not a Mixture-of-Experts"
    ),
    "a peft_config that is a dict": (
        case(lambda given: {"peft_config": {"r": 4}}), "trainer", TypeError, "must be a `peft.PeftConfig`"
    ),
    "an adapter upon an adapter": (
        case(lambda given: {
            "model": get_peft_model(given.llama(), LoraConfig(r=2, target_modules="all-linear")),
            "peft_config": LoraConfig(r=2, target_modules="all-linear"),
        }), "trainer", ValueError, "`PeftModel` instance together",
    ),
    "an adapter on the head": (
        case(lambda given: {"peft_config": LoraConfig(r=2, target_modules=["lm_head"])}),
        "trainer", ValueError, "adapter to `lm_head`",
    ),
    # the loss and the steps
    "an unknown loss_type": (case(loss_type="mse"), "trainer", ValueError, "Invalid `loss_type` mse"),
    "dft and a loss of one's own": (
        case(lambda given: {"compute_loss_func": lambda *given, **keywords: 0}, loss_type="dft"),
        "trainer", ValueError, "together with `loss_type='dft'`",
    ),
    "selective without checkpointing": (
        case(gradient_checkpointing=False, gradient_checkpointing_kwargs={"selective": True}),
        "trainer", ValueError, "requires `gradient_checkpointing=True`",
    ),
    "selective and reentrant": (
        case(gradient_checkpointing_kwargs={"selective": True, "use_reentrant": True}),
        "trainer", ValueError, "non-reentrant",
    ),
    "activation_offloading without an accelerator": (
        case(activation_offloading=True, gradient_checkpointing=False), "trainer", Exception, ""
    ),
    "use_liger_kernel without Liger": (case(use_liger_kernel=True), "act", ImportError, "liger"),
    "optimizers and optimizer_cls_and_kwargs": (
        case(lambda given: {
            "optimizers": (torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), None),
            "optimizer_cls_and_kwargs": (torch.optim.SGD, {}),
        }), "trainer", RuntimeError, "optimizer_cls_and_kwargs",
    ),
    "a loss that raises": (
        case(lambda given: {"compute_loss_func": lambda *given, **keywords: 1 / 0}), "act", ZeroDivisionError, ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_raised_as_in_trl(name, run_both):
    made, at, kind, words = ERRORS[name]
    ours, theirs = run_both(made)
    assert theirs.at == at and isinstance(theirs.error, kind) and words in str(theirs.error), repr(theirs)
    assert_same_ending(ours, theirs)


CALLS = {
    "a checkpoint that is nowhere": lambda trainer, given: trainer.train(resume_from_checkpoint="nowhere"),
    "no checkpoint to go on from": lambda trainer, given: trainer.train(resume_from_checkpoint=True),
    "evaluate without rows": lambda trainer, given: trainer.evaluate(),
    "push_to_hub offline": lambda trainer, given: trainer.push_to_hub(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_raises_as_in_trl(name, run_both):
    ours, theirs = run_both(case(), CALLS[name])
    assert theirs.at == "act" and theirs.error is not None
    assert_same_ending(ours, theirs)
