"""Runs that would teach nothing, or something else, and of which every number looks right."""

import pytest

from truetune.proof.errors import ProofError


def said(trainer, name):
    """What the checks of a name warn of or fail for."""
    return "; ".join(c.mend for c in trainer.preflight().checks if c.name == name and c.verdict in ("warn", "fail"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": 0.0}, "the learning rate is 0"),
        ({"max_steps": -1, "num_train_epochs": 0}, "there is no step"),
        ({"warmup_steps": 1000, "lr_scheduler_type": "linear"}, "0.001 is never reached"),
        ({"warmup_steps": 1, "max_steps": 1}, "0.001 is never reached"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 40, "lr_end": 0}, "max_steps": 50},
         "nearly 0 in "),
        ({"max_grad_norm": 1e-8}, "a norm of 1e-08 are lost beside adam_epsilon"),
        ({"adam_epsilon": 1.0}, "lost beside adam_epsilon 1"),
        ({"weight_decay": 4000.0}, "weight decay alone leaves"),
    ],
    ids=["rate", "steps", "warm-up", "one step", "power", "clipping", "epsilon", "decay"],
)  # fmt: skip
def test_a_schedule_that_moves_nothing_is_named(make, fields, words):
    assert words in said(make(preflight="quick", **fields), "schedule")


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"warmup_steps": 0.1, "max_steps": 100}, {"lr_scheduler_type": "cosine", "max_steps": 5000},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "evaluate": True}, {"max_steps": 1},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_steps": 50},
        {"weight_decay": 0.1, "max_steps": 10_000}, {"optim": "adafactor", "max_grad_norm": 1e-8},
        {"max_steps": -1, "num_train_epochs": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_a_schedule_that_trains_is_not(make, fields):
    assert not said(make(preflight="quick", **fields), "schedule")


def test_a_rate_of_zero_stops_the_command_lines_preflight(make):
    with pytest.raises(ProofError, match=r"the learning rate is 0, .* accept it with allow: \[schedule\]"):
        make(preflight="full", learning_rate=0.0).train()


def test_a_run_that_had_no_rate_says_that_nothing_was_learned(make):
    trainer = make(preflight="quick", learning_rate=0.0)
    trainer.train()
    (check,) = [check for check in trainer.proof.checks if check.name == "trained tensors"]
    assert (check.verdict, check.seen) == ("warn", "no step had a learning rate above zero")


@pytest.mark.parametrize("fields", [{"packing": True}, {"packing": False, "gradient_accumulation_steps": 4}], ids=str)
def test_the_steps_that_are_planned_are_those_that_are_made(make, fields):
    trainer = make(preflight="off", max_steps=-1, num_train_epochs=1.5, **fields)
    planned = trainer.planned_steps()
    trainer.train()
    assert trainer.state.global_step == planned
