"""Each option of TRL's `SFTConfig`, and those of Transformers' that meet what truetune replaces."""

import copy
import dataclasses

import pytest
import trl
from outcomes import assert_same_run, case
from transformers import TrainingArguments

BFD = {"packing": True, "max_length": 128}
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def marked(given):
    """Chats, and a template that marks what the assistant says."""
    given.tokenizer.chat_template = GENERATION
    return {"train_dataset": given.chats}


def evaluated(given):
    return {"eval_dataset": given.data.select(range(5))}


def another_tokenizer(given):
    """A directory with a template and two tokens that the model's own tokenizer lacks."""
    other = copy.deepcopy(given.tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|end|>"]})
    other.eos_token, other.chat_template = "<|end|>", GENERATION
    other.save_pretrained(given.folder / "other")
    return str(given.folder / "other")


TRAINED = {
    "defaults": case(),
    # the model
    "model_init_kwargs": case(
        lambda given: {"model": given.saved_model}, model_init_kwargs={"attn_implementation": "eager"}
    ),
    "model_init_kwargs, dtype": case(
        lambda given: {"model": given.saved_model}, model_init_kwargs={"dtype": "float32", "use_cache": False}
    ),
    "model_init_kwargs as JSON": case(
        lambda given: {"model": given.saved_model}, model_init_kwargs='{"dtype": "float32"}'
    ),
    "model_init_kwargs beside a model": case(model_init_kwargs={"dtype": "float32"}),
    "trust_remote_code": case(lambda given: {"model": given.saved_model}, trust_remote_code=True),
    "router_aux_loss_coef of 0 without experts": case(router_aux_loss_coef=0.0),
    "chat_template_path, a file": case(
        marked, chat_template_path=lambda given: given.write("chat.jinja", "{{ 'Chat: ' }}" + GENERATION)
    ),
    "chat_template_path, a tokenizer": case(
        lambda given: {"train_dataset": given.chats}, chat_template_path=another_tokenizer
    ),
    # the data
    "dataset_text_field": case(
        lambda given: {"train_dataset": given.texts.rename_column("text", "body")}, dataset_text_field="body"
    ),
    "dataset_num_proc": case(dataset_num_proc=2),
    "dataset_kwargs": case(
        lambda given: {"train_dataset": given.tokenized.remove_columns("mask")},
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    "dataset_kwargs as JSON": case(
        lambda given: {"train_dataset": given.tokenized.remove_columns("mask")},
        dataset_kwargs='{"skip_prepare_dataset": true}',
    ),
    "eos_token": case(lambda given: {"train_dataset": given.texts}, eos_token="<|im_start|>"),
    "pad_token": case(pad_token="<|im_start|>"),
    "max_length": case(lambda given: {"train_dataset": given.texts}, max_length=24),
    "max_length off": case(max_length=None),
    "truncation_mode keep_start": case(truncation_mode="keep_start", max_length=48),
    "truncation_mode keep_end": case(truncation_mode="keep_end", max_length=48),
    "shuffle_dataset": case(shuffle_dataset=True, seed=7),
    "shuffle_dataset, packed": case(shuffle_dataset=True, **BFD),
    "packing": case(evaluated, **BFD),
    "packing bfd_split": case(packing=True, packing_strategy="bfd_split", max_length=40),
    "packing wrapped": case(packing=True, packing_strategy="wrapped", max_length=64),
    "packing bfd-requeue": case(packing=True, packing_strategy="bfd-requeue", max_length=40),
    "packing in batches of 1": case(per_device_train_batch_size=1, **BFD),
    "eval_packing off": case(evaluated, eval_packing=False, **BFD),
    "eval_packing alone": case(evaluated, eval_packing=True, max_length=128),
    "padding_free": case(evaluated, padding_free=True, max_length=None),
    "padding_free in batches of 1": case(padding_free=True, max_length=None, per_device_train_batch_size=1),
    "padding_free and packing": case(padding_free=True, **BFD),
    "padding_free and wrapped": case(padding_free=True, packing=True, packing_strategy="wrapped", max_length=64),
    "pad_to_multiple_of": case(evaluated, pad_to_multiple_of=32),
    "pad_to_multiple_of, padding-free": case(pad_to_multiple_of=32, padding_free=True, max_length=None),
    "pad_to_multiple_of, packed": case(pad_to_multiple_of=32, **BFD),
    "pad_to_multiple_of auto": case(pad_to_multiple_of="auto", needs="trl 1.16"),
    "pad_to_multiple_of as text": case(pad_to_multiple_of="32", needs="trl 1.16"),
    "pad_to_multiple_of none as text": case(pad_to_multiple_of="none", needs="trl 1.16"),
    "pad_to_multiple_of none": case(pad_to_multiple_of=None),
    # the loss
    "completion_only_loss": case(evaluated, completion_only_loss=True),
    "completion_only_loss off": case(evaluated, completion_only_loss=False),
    "completion_only_loss, packed": case(completion_only_loss=True, **BFD),
    "assistant_only_loss": case(marked, assistant_only_loss=True),
    "assistant_only_loss, packed": case(marked, assistant_only_loss=True, **BFD),
    "loss_type dft": case(evaluated, loss_type="dft"),
    "loss_type chunked_nll": case(loss_type="chunked_nll"),
    "label_smoothing_factor, dft": case(label_smoothing_factor=0.1, loss_type="dft"),
    "average_tokens_across_devices off": case(average_tokens_across_devices=False),
    # memory
    "gradient_checkpointing off": case(gradient_checkpointing=False),
    "gradient_checkpointing_kwargs": case(gradient_checkpointing_kwargs={"use_reentrant": False}),
    "gradient_checkpointing, reentrant": case(gradient_checkpointing_kwargs={"use_reentrant": True}),
    "gradient_checkpointing, selective": case(gradient_checkpointing_kwargs={"selective": True}),
    "gradient_checkpointing, not selective": case(gradient_checkpointing_kwargs={"selective": False}),
    "activation_checkpointing off": case(needs="transformers 5.23", activation_checkpointing=False),
    "activation_checkpointing": case(needs="transformers 5.23", activation_checkpointing=True),
    "activation_checkpointing_kwargs": case(
        needs="transformers 5.23", activation_checkpointing_kwargs={"every_n_layers": 2}
    ),
    "torch_empty_cache_steps": case(torch_empty_cache_steps=1),
    "auto_find_batch_size": case(auto_find_batch_size=True),
    # the steps
    "gradient_accumulation_steps": case(gradient_accumulation_steps=3),
    "num_train_epochs": case(max_steps=-1, num_train_epochs=0.25),
    "an epoch that accumulation does not divide": case(
        lambda given: {"train_dataset": given.data.select(range(10))},
        max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=3,
    ),
    "learning_rate": case(learning_rate=1e-2),
    "lr_scheduler_type": case(lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}),
    "lr_scheduler_kwargs as JSON": case(
        lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs='{"num_cycles": 2}'
    ),
    "warmup_steps": case(warmup_steps=1, max_steps=3),
    "weight_decay": case(weight_decay=0.3, learning_rate=1e-2),
    "max_grad_norm": case(max_grad_norm=0.01, learning_rate=1e-2),
    "max_grad_norm off": case(max_grad_norm=0.0, learning_rate=1e-2),
    "optim sgd": case(optim="sgd", learning_rate=1e-1),
    "optim adafactor": case(optim="adafactor", learning_rate=1e-3),
    "optim_args": case(optim="adamw_torch", optim_args="eps=1e-3", learning_rate=1e-2),
    "adam_beta1": case(adam_beta1=0.5, adam_beta2=0.8, adam_epsilon=1e-4, max_steps=3),
    # the order
    "seed": case(seed=5),
    "data_seed": case(data_seed=5),
    "train_sampling_strategy group_by_length": case(train_sampling_strategy="group_by_length"),
    "train_sampling_strategy sequential": case(train_sampling_strategy="sequential"),
    "dataloader_drop_last": case(
        lambda given: {"train_dataset": given.data.select(range(5)), "eval_dataset": given.data.select(range(5))},
        dataloader_drop_last=True, max_steps=3,
    ),
    "accelerator_config dispatch_batches": case(evaluated, accelerator_config={"dispatch_batches": True}),
    "accelerator_config split_batches": case(evaluated, accelerator_config={"split_batches": True}),
    "dataloader_num_workers": case(evaluated, dataloader_num_workers=1),
    # logs and evaluations
    "logging_steps": case(logging_steps=2, max_steps=3),
    "logging_steps, a part": case(logging_steps=0.5, max_steps=4),
    "logging_first_step": case(logging_first_step=True, logging_steps=2),
    "logging_strategy epoch": case(
        lambda given: {"train_dataset": given.data.select(range(4))}, logging_strategy="epoch", max_steps=4
    ),
    "eval_strategy epoch": case(
        lambda given: {"train_dataset": given.data.select(range(4)), **evaluated(given)},
        eval_strategy="epoch", max_steps=4,
    ),
    "eval_strategy no": case(evaluated, eval_strategy="no"),
    "eval_on_start": case(evaluated, eval_on_start=True),
    "eval_delay": case(evaluated, eval_delay=2, max_steps=3),
    "eval_accumulation_steps": case(evaluated, eval_accumulation_steps=1),
    "prediction_loss_only": case(evaluated, prediction_loss_only=True),
    "include_num_input_tokens_seen": case(include_num_input_tokens_seen="non_padding"),
    "remove_unused_columns off": case(
        lambda given: {"train_dataset": given.tokenized.remove_columns("mask")}, remove_unused_columns=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_an_option_trains_as_in_trl(name, run_both):
    ours, theirs = run_both(TRAINED[name])
    assert_same_run(ours, theirs)
    assert sum("loss" in entry for entry in theirs.trainer.state.log_history) > 0
    assert ours.trainer.report.fused_losses > 0
    assert ours.trainer.report.padded_batches == 0


def test_every_field_of_trls_own_has_a_case():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    of_trl = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    defined_there = [vars(base) for base in trl.SFTConfig.__mro__ if base.__module__.startswith("trl")]
    overridden = {name for names in defined_there for name in names.get("__annotations__", {}) if name in of_trl}
    tried = {name for each in TRAINED.values() for name in each.fields}
    elsewhere = {
        "bf16",  # every case sets it; under autocast, gradients are judged by an fp32 run's in test_drop_in.py
        "use_liger_kernel", "activation_offloading",  # fail here alike: test_errors.py
    }  # fmt: skip
    assert (of_trl - inherited) | overridden <= tried | elsewhere
    assert not tried & elsewhere
