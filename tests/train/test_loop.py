"""Transformers' loop without its waits: the same logs."""

import pytest
import torch
from transformers import TrainerCallback

import truetune
from pairs import SETTINGS, llama

NOT_FINITE = {1: float("nan"), 4: float("inf"), 5: float("nan"), 8: float("-inf")}  # by micro-batch, of 12


class Broken(truetune.SFTTrainer):
    """Whose losses are not finite now and then; gradients are."""

    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.calls += 1
        return loss + NOT_FINITE.get(self.calls - 1, 0.0)


class BrokenAndLookedAt(Broken):
    """What overrides `training_step` sees losses as they are, and Transformers filters them."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        assert loss.isfinite() == (self.calls - 1 not in NOT_FINITE)
        return loss


@pytest.fixture
def make(tokenizer, data, tmp_path):
    def make(trainer_class, **fields):
        run = {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_steps": 2, "preflight": "off"}
        args = truetune.SFTConfig(**{**SETTINGS, "output_dir": str(tmp_path), **run, **fields})
        return trainer_class(model=llama(tokenizer), args=args, train_dataset=data, processing_class=tokenizer)

    return make


def logged(trainer):
    asked = trainer.args.logging_nan_inf_filter
    trainer.train()
    assert trainer.args.logging_nan_inf_filter == asked
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def test_losses_that_are_not_finite_are_filtered_as_transformers_does(make):
    ours, theirs = (logged(make(trainer_class)) for trainer_class in (Broken, BrokenAndLookedAt))
    assert len(ours) == 3
    assert ours == theirs
    unfiltered = logged(make(Broken, logging_nan_inf_filter=False))
    assert not any(torch.tensor(loss).isfinite() for loss, _ in unfiltered)


def test_the_device_is_not_asked_whether_a_loss_is_finite(make, monkeypatch):
    monkeypatch.setattr(torch, "isnan", lambda x: pytest.fail("asked"))
    assert len(logged(make(truetune.SFTTrainer))) == 3


def test_arguments_are_the_users_whenever_they_are_read_and_after_a_failure(make):
    read = []

    class Reads(TrainerCallback):
        def on_step_begin(self, args, *_, **__):
            read.append(args.logging_nan_inf_filter)

        def on_step_end(self, args, state, *_, **__):
            read.append(args.logging_nan_inf_filter)
            if state.global_step == 3:
                raise KeyError

    trainer = make(truetune.SFTTrainer)
    trainer.add_callback(Reads())
    with pytest.raises(KeyError):
        trainer.train()
    assert read == [True] * 6

    trainer = make(truetune.SFTTrainer)
    trainer.floating_point_ops = lambda inputs: 1 / 0  # which would take the filter back
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.args.logging_nan_inf_filter
