"""What scripts call on a trainer and override in it: the same answers, metrics and events."""

import numpy as np
import pytest
import torch
import trl
from outcomes import assert_same_ending, assert_same_run, case, train
from peft import LoraConfig
from transformers import TrainerCallback

from pairs import assert_same_metrics


class Recorder(TrainerCallback):
    """The events of a run in their order, with the step and the control flags they found."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **keywords: self.events.append(
            (name, state.global_step, control.should_log, control.should_evaluate, sorted(keywords))
        )


# -- calls


def evaluated(given):
    return {"eval_dataset": given.data.select(range(5))}


def several(given):
    return {"eval_dataset": {"short": given.data.select(range(2)), "chats": given.chats.select(range(3))}}


def prepared(trainer, given):
    rows = given.data.select(range(5, 9))
    return trainer._prepare_dataset(rows, trainer.processing_class, trainer.args, False, None, "test")


def padded_batch(trainer, given):
    return trainer.data_collator([{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7, 8], [9, 10, 11])])


def recorded(trainer, given):
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.events


def with_grads(trainer, given):
    trainer.create_optimizer_and_scheduler(4)
    trainer.model.train()
    loss = trainer.training_step(trainer.model, padded_batch(trainer, given), torch.tensor(5))
    return {"loss": float(loss), **{name: norm(p.grad) for name, p in trainer.model.named_parameters()}}


def norm(gradient) -> float:
    return 0.0 if gradient is None else float(gradient.norm())


def loss_and_logits(trainer, given):
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, padded_batch(trainer, given), return_outputs=True)
    return [loss.detach().numpy(), outputs.logits.detach().numpy()]


def predicted(trainer, given, **settings):
    output = trainer.predict(prepared(trainer, given), **settings)
    return [output.predictions, output.label_ids, output.metrics]


def answered_after_training(trainer, given):
    trainer.train()
    prompt = given.tokenizer(["How many"], return_tensors="pt")
    return trainer.model.eval().generate(**prompt, max_new_tokens=6, do_sample=False).tolist()


def described(trainer, given):
    trainer.create_optimizer_and_scheduler(4)
    return {
        "groups": [(len(group["params"]), group["weight_decay"]) for group in trainer.optimizer.param_groups],
        "optimizer": type(trainer.optimizer).__name__,
        "trainable": trainer.get_num_trainable_parameters(),
        "rates": trainer.get_learning_rates(),
        "decayed": trainer.get_decay_parameter_names(trainer.model),
        "batches": len(trainer.get_train_dataloader()),
        "examples": trainer.num_examples(trainer.get_train_dataloader()),
        "columns": trainer._signature_columns,
        "labels": trainer.label_names,
        "ranks": (trainer.is_world_process_zero(), trainer.is_local_process_zero(), trainer.args.world_size),
    }


def trained_twice(trainer, given):
    trainer.train()
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


def trained_on_other_data(trainer, given):
    """The collator and the data exchanged between two calls."""
    trainer.train()
    trainer.train_dataset = prepared(trainer, given)
    trainer.data_collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(trainer.data_collator.pad_token_id)
    return trainer.train().metrics


CALLS = {
    "train returns": (case(), lambda trainer, given: dict(trainer.train().metrics)),
    "train twice": (case(), trained_twice),
    "train on other data": (case(), trained_on_other_data),
    "evaluate": (case(evaluated), lambda trainer, given: trainer.evaluate()),
    "evaluate after training": (case(evaluated), lambda trainer, given: (trainer.train(), trainer.evaluate())[1]),
    "evaluate rows as they are": (case(), lambda trainer, given: trainer.evaluate(given.data.select(range(5)))),
    "evaluate chats": (case(), lambda trainer, given: trainer.evaluate(given.chats.select(range(3)))),
    "evaluate a dict": (case(), lambda trainer, given: trainer.evaluate(several(given)["eval_dataset"])),
    "evaluate one by its name": (case(several), lambda trainer, given: trainer.evaluate("chats")),
    "evaluate under another prefix": (
        case(evaluated), lambda trainer, given: trainer.evaluate(metric_key_prefix="test")
    ),
    "evaluate a stream": (
        case(), lambda trainer, given: trainer.evaluate(given.data.select(range(5)).to_iterable_dataset())
    ),
    "evaluate packed": (case(evaluated, packing=True, max_length=128), lambda trainer, given: trainer.evaluate()),
    "evaluate with formatting_func": (
        case(lambda given: {"formatting_func": lambda row: row["completion"]}, completion_only_loss=False),
        lambda trainer, given: trainer.evaluate(given.data.select(range(4))),
    ),
    "predict": (case(), predicted),
    "predict under another prefix": (
        case(), lambda trainer, given: predicted(trainer, given, metric_key_prefix="held_out")
    ),
    "predict with ignore_keys": (case(), lambda trainer, given: predicted(trainer, given, ignore_keys=["logits"])),
    "predict losses alone": (case(prediction_loss_only=True), predicted),
    "compute_loss": (case(), lambda trainer, given: float(
        trainer.compute_loss(trainer.model, padded_batch(trainer, given))
    )),
    "compute_loss with num_items_in_batch": (case(), lambda trainer, given: float(
        trainer.compute_loss(trainer.model, padded_batch(trainer, given), num_items_in_batch=torch.tensor(3))
    )),
    "compute_loss with outputs": (case(), loss_and_logits),
    "training_step": (case(), with_grads),
    "training_step, dft": (case(loss_type="dft"), with_grads),
    "prediction_step": (case(), lambda trainer, given: [
        x.numpy() for x in trainer.prediction_step(trainer.model, padded_batch(trainer, given), False)
    ]),
    "the events of callbacks": (case(evaluated, save_strategy="steps", save_steps=1), recorded),
    "the events of callbacks, accumulated": (case(evaluated, gradient_accumulation_steps=2), recorded),
    "pop_callback": (
        case(lambda given: {"callbacks": [Recorder()]}),
        lambda trainer, given: type(trainer.pop_callback(Recorder)).__name__,
    ),
    "what a trainer says of itself": (case(weight_decay=0.1), described),
    "what a trainer says of itself, adapter": (
        case(lambda given: {"peft_config": LoraConfig(r=4, target_modules="all-linear")}, weight_decay=0.1), described
    ),
    "generate after training": (case(learning_rate=1e-2), answered_after_training),
    "generate after training an adapter": (
        case(lambda given: {"peft_config": LoraConfig(r=4, target_modules="all-linear")}, learning_rate=1e-2),
        answered_after_training,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_answers_as_in_trl(name, run_both):
    made, call = CALLS[name]
    ours, theirs = run_both(made, call)
    assert_same_run(ours, theirs)
    assert_same_answer(ours.result, theirs.result)


def assert_same_answer(ours, theirs) -> None:
    assert type(ours) is type(theirs)
    if isinstance(theirs, np.ndarray):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)
    elif isinstance(theirs, dict) and all(isinstance(value, float | int) for value in theirs.values()):
        assert_same_metrics(ours, theirs)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5)
    elif isinstance(theirs, list) and any(isinstance(part, np.ndarray | dict) for part in theirs):
        for parts in zip(ours, theirs, strict=True):
            assert_same_answer(*parts)
    else:
        assert ours == theirs


# -- overrides, as scripts write them


def own_step(library):
    class Trainer(library.SFTTrainer):
        def training_step(self, *args, **kwargs):
            return 2 * super().training_step(*args, **kwargs)

    return Trainer


def own_log(library):
    class Trainer(library.SFTTrainer):
        def log(self, logs, start_time=None):
            super().log({**logs, "double": 2 * logs.get("loss", 0.0)}, start_time)

    return Trainer


def own_metrics(library):
    class Trainer(library.SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self._metrics["train" if self.model.training else "eval"]["seen"].append(1.0)
            return loss

    return Trainer


def own_optimizer(library):
    class Trainer(library.SFTTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2)
            return self.optimizer

    return Trainer


def own_loader(library):
    class Trainer(library.SFTTrainer):
        def get_train_dataloader(self):
            rows = self._remove_unused_columns(self.train_dataset, "training")
            return torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=self.data_collator)

    return Trainer


def own_rows(library):
    class Trainer(library.SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            return super()._prepare_dataset(*args, **kwargs).select(range(4))

    return Trainer


def own_inputs(library):
    class Trainer(library.SFTTrainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            if "labels" in inputs:
                inputs["labels"] = torch.where(inputs["labels"] % 2 == 0, -100, inputs["labels"])
            return inputs

    return Trainer


def own_labels(library):
    """Prompts are supervised after all."""

    class Trainer(library.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            labels, ids = inputs["labels"], inputs["input_ids"]
            real = inputs["attention_mask"] == 1 if "attention_mask" in inputs else torch.ones_like(ids).bool()
            if "position_ids" in inputs:
                real &= inputs["position_ids"] > 0
            inputs["labels"] = torch.where((labels == -100) & real, ids, labels)
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Trainer


def own_evaluation(library):
    class Trainer(library.SFTTrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_extra": 1.0}

    return Trainer


OVERRIDES = [
    own_step,
    own_log,
    own_metrics,
    own_optimizer,
    own_loader,
    own_rows,
    own_inputs,
    own_labels,
    own_evaluation,
]


@pytest.mark.parametrize("override", OVERRIDES, ids=[override.__name__ for override in OVERRIDES])
def test_a_subclass_overrides_as_under_trls(override, run_both):
    def train_subclass(trainer, given):
        """The first trainer's parts, given to a subclass."""
        arguments = {"train_dataset": given.data, "processing_class": given.tokenizer, **evaluated(given)}
        trainer = override(given.library)(given.llama(), args=trainer.args, **arguments)
        train(trainer, given)
        return trainer

    ours, theirs = run_both(case(evaluated), train_subclass)
    assert_same_ending(ours, theirs)
    ours.trainer, theirs.trainer = ours.result, theirs.result
    assert_same_run(ours, theirs)
    assert ours.trainer.report.fused_losses > 0
