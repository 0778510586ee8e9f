"""The largest batch before the first step: no trace, and a plan that follows what was measured."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from train.small_trainers import DOCUMENTS, LAYERS, line, maker, trajectory
from truetune.models.attention import attention_calls
from truetune.models.memory import CHOICES, RECOMPUTED
from truetune.models.plan import Rates, Room
from truetune.train import activations as activations_module
from truetune.train.errors import TrainError
from truetune.train.rehearsal import Rehearsed
from truetune.train.trainer import SFTTrainer


@pytest.fixture
def make(tokenizer, tmp_path):
    return maker(tokenizer, tmp_path)


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False, "every_n_layers": 2}])
def test_a_rehearsal_is_checkpointed_as_the_training_is(make, kwargs):
    """Without, it would need more memory than the training, and refuse what fits."""
    trainer = make(SFTTrainer, gradient_checkpointing_kwargs=kwargs, fuse=kwargs is not None)
    before = attention_calls.total()
    trainer.rehearse()
    assert attention_calls.total() - before == (2 * LAYERS if kwargs is None else LAYERS + LAYERS // 2)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


def states(trainer):
    model = trainer.model
    return copy.deepcopy(
        {
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state(),
            "parameters": dict(model.named_parameters()),
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "buffers": dict(model.named_buffers()),
            "hooks": [len(module._forward_hooks) for module in model.modules()],
            "modes": [module.training for module in model.modules()],
            "metrics": trainer._metrics,
            "device metrics": {mode: m.peek() for mode, m in trainer._device_metrics.items()},
            "counted": [trainer.report.fused_losses, trainer.report.packed_batches, trainer.report.attention_calls],
            "state": trainer.state.to_json_string() if hasattr(trainer.state, "to_json_string") else None,
        }
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("kind", ["recipe", "packed by TRL", "padded", "not fused", "unplanned"])
def test_a_rehearsal_leaves_no_trace(make, kind, tokenizer):
    def trainer():
        fields = {"dropout": 0.3}
        if kind == "not fused":
            torch.manual_seed(0)
            model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2))
            return make(SFTTrainer, model=model)
        if kind == "unplanned":
            return make(SFTTrainer, gradient_checkpointing_kwargs={"use_reentrant": False}, **fields)
        if kind == "recipe":
            return make(eval_dataset=DOCUMENTS, eval_strategy="steps", eval_steps=2, **fields)
        return make(SFTTrainer, packing=kind == "packed by TRL", loss_type="dft", **fields)

    def seed():
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    rehearsed, plain = trainer(), trainer()
    seed()
    rehearsed.model.eval()
    before = states(rehearsed)
    rehearsed.rehearse()
    after = states(rehearsed)
    for name in before:
        assert same(before[name], after[name]), name
    with_rehearsal = trajectory(rehearsed)
    seed()
    assert trajectory(plain) == with_rehearsal
    parameters = zip(rehearsed.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({}, "lower per_device_train_batch_size from 2"),
        ({"per_device_train_batch_size": 1}, "train on shorter rows (max_length)"),
        ({"gradient_checkpointing": False}, "set gradient_checkpointing=True, or lower"),
    ],
)
def test_what_is_not_planned_and_runs_out_is_refused_with_a_mend(make, fields, mend, monkeypatch):
    trainer = make(SFTTrainer, fuse=False, **fields)
    assert trainer.rehearse() is None
    monkeypatch.setattr("truetune.train.rehearsal.rehearse", lambda *_: Rehearsed(None, 0))
    with pytest.raises(TrainError, match="runs out of device memory: ") as raised:
        trainer.rehearse()
    assert mend in str(raised.value)


def test_what_cannot_be_tried_is_said_once(make):
    trainer = make(SFTTrainer, fuse=False)
    trainer.largest_batch = lambda evaluation=False: {"pixels": torch.zeros(1)}
    for _ in range(2):
        trainer.rehearse()
    assert line(trainer).why == "not every layer is fused; not rehearsed: its batches have no input_ids or labels"


def test_an_optimizer_that_keeps_no_gradients_is_not_judged_with_all_of_them(make):
    trainer = make(SFTTrainer, fuse=False, optim="lomo")
    trainer.rehearse()
    assert line(trainer).why.endswith("not rehearsed: lomo drops gradients while they are made")


def test_gradients_from_before_stay(make):
    trainer = make()
    parameter = next(trainer.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    trainer.rehearse()
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_the_largest_batch_is_rehearsed(make):
    trainer = make()
    fullest = sorted((sum(len(DOCUMENTS[i]["input_ids"]) for i in pack)
                      for pack in trainer._sampler(DOCUMENTS, trainer.args.seed)), reverse=True)  # fmt: skip
    assert trainer.largest_batch()["input_ids"].numel() == sum(fullest[:2])
    assert trainer.token_budget() == 2 * 64
    alone = make(SFTTrainer)
    assert alone.largest_batch()["input_ids"].numel() == 44 + 40
    assert alone.token_budget() == 2 * 44
    stream = make(SFTTrainer, train_dataset=DOCUMENTS.to_iterable_dataset())
    assert stream.largest_batch() is None
    stream.rehearse()  # with as much as its batches can hold
    assert stream.activations.plan.tokens == stream.token_budget() == 2 * 64
    assert not line(stream).why
    padded = make(SFTTrainer, train_dataset=DOCUMENTS.to_iterable_dataset(), neftune_noise_alpha=5.0)
    padded.rehearse()
    assert "not rehearsed" in line(padded).why
    unplanned = make(SFTTrainer, train_dataset=DOCUMENTS.to_iterable_dataset(), fuse=False)
    unplanned.rehearse()
    assert "not rehearsed" in line(unplanned).why


@pytest.mark.parametrize("fuse", [True, False])
def test_token_ids_without_an_embedding_do_not_reach_the_device(make, fuse, tokenizer):
    rows = DOCUMENTS.map(lambda row: {"input_ids": [len(tokenizer), *row["input_ids"][1:]]})
    with pytest.raises(TrainError, match="no embedding for"):
        make(SFTTrainer, train_dataset=rows, fuse=fuse).rehearse()


class Device:
    """A device of `available` bytes, for which predictions are wrong by the `factor` of choices: it answers rehearsals.

    The layers are taken to be as wide as an 8B model's, so that what they save is what counts.
    """

    def __init__(self, trainer, available, factor: float | Callable[[tuple[str, ...]], float]) -> None:
        self.activations, self.rehearsed = trainer.activations, []
        self.factor = factor if callable(factor) else lambda choices: factor
        memory = self.activations.memory
        layer = replace(memory.model.layers[0], hidden=4096, query=4096, key=1024, intermediate=14336, gradients=0)
        memory = replace(memory, model=replace(memory.model, layers=(layer,) * LAYERS), optimizer=0)
        memory = replace(memory, tokens=trainer.largest_batch()["input_ids"].numel())
        self.activations.memory = memory
        available = available({choice: memory.peak((choice,) * LAYERS) for choice in CHOICES})
        self.activations.room = Room(available, 0)
        self.activations.rates = Rates(1.0, 1.0, 0.5, 0.4, host_rate=1e9, host_bytes=10**15)

    def __call__(self, trainer, batch) -> Rehearsed:
        plan = self.activations.plan.choices
        self.rehearsed.append(plan)
        memory = replace(self.activations.memory.before_first_step(), correction=1.0)
        peak = memory.held + round(self.factor(plan) * (memory.peak(plan) - memory.held))
        fits = peak <= self.activations.room.available
        return Rehearsed(peak if fits else None, memory.held)


@pytest.fixture
def on_device(make, monkeypatch):
    def on_device(available, factor, policy="auto"):
        trainer = make(activation_policy=policy)
        device = Device(trainer, available, factor)
        monkeypatch.setattr(activations_module, "rehearse", device)
        return trainer, device

    return on_device


def test_a_plan_that_needs_more_than_predicted_becomes_leaner(on_device):
    trainer, device = on_device(lambda peak: peak["keep"] + 10_000, 1.3)
    trainer.rehearse()
    assert len(device.rehearsed) > 1
    assert set(device.rehearsed[0]) == {"keep"}
    assert device.rehearsed[-1] == trainer.activations.plan.choices != device.rehearsed[0]
    assert trainer.activations.plan.measured_peak <= device.activations.room.available
    assert line(trainer).in_effect == trainer.activations.plan.in_words
    assert [layer.activations.recompute for layer in trainer.activations.layers] == [
        choice in RECOMPUTED for choice in trainer.activations.plan.choices
    ]


def test_a_plan_that_needs_less_than_predicted_becomes_faster(on_device):
    trainer, device = on_device(lambda peak: (peak["keep"] + peak["recompute"]) // 2, 0.5)
    device.activations._apply(("recompute",) * LAYERS)
    trainer.rehearse()
    assert trainer.activations.plan.choices == ("keep",) * LAYERS
    assert trainer.activations.plan.correction == pytest.approx(0.5, rel=1e-3)


def test_choices_that_are_predicted_less_well_are_not_tried_again(on_device):
    """All of lean needs more than predicted, a mix runs out of memory, and the leanest alone has its margin."""

    def factor(choices):
        return {("lean",) * LAYERS: 1.3, ("checkpoint_host",) * LAYERS: 0.8}.get(choices, 2.0)

    # Enough for lean as it is measured, not for what the margin adds.
    trainer, device = on_device(lambda peak: round(1.31 * peak["lean"]), factor, policy="lean")
    device.activations._apply(("lean",) * LAYERS)
    trainer.rehearse()
    assert len(set(device.rehearsed)) == len(device.rehearsed) > 1
    assert trainer.activations.plan.choices == device.rehearsed[-1] == ("checkpoint_host",) * LAYERS
    assert trainer.activations.plan.correction == pytest.approx(0.8, rel=1e-3)  # its own, not the worst


def test_a_plan_without_its_margin_gives_way_to_a_leaner_one_that_was_not_predicted_to_have_it(on_device):
    lean = ("lean",) * LAYERS
    trainer, device = on_device(
        lambda peak: round(1.35 * peak["lean"]), lambda choices: 1.3 if choices == lean else 0.8, policy="lean"
    )
    activations = device.activations
    activations.room = replace(activations.room, device=6 * activations.room.available)
    activations._apply(lean)
    trainer.rehearse()
    assert device.rehearsed == [lean, activations.plan.choices]
    assert activations.room.fits(activations.memory, activations.plan.choices)


def test_a_plan_without_its_margin_is_kept_where_the_leaner_ones_run_out_of_memory(on_device):
    lean = ("lean",) * LAYERS
    trainer, device = on_device(
        lambda peak: round(1.31 * peak["lean"]), lambda choices: 1.3 if choices == lean else 2.5, policy="lean"
    )
    device.activations._apply(lean)
    trainer.rehearse()
    assert len(device.rehearsed) > 1
    assert trainer.activations.plan.choices == lean
    assert trainer.activations.plan.correction == pytest.approx(1.3, rel=1e-3)


def test_of_plans_without_their_margin_the_one_that_needs_least_is_taken(on_device):
    lean = ("lean",) * LAYERS

    def factor(choices):  # all others need more, as measured
        memory = replace(device.activations.memory.before_first_step(), correction=1.0)
        return 1.25 if choices == lean else 1.34 * memory.peak(lean) / memory.peak(choices)

    trainer, device = on_device(lambda peak: round(1.35 * peak["lean"]), factor, policy="lean")
    activations = device.activations
    activations.room = replace(activations.room, device=6 * activations.room.available)
    activations._apply(lean)
    trainer.rehearse()
    assert len(device.rehearsed) > 1
    assert activations.plan.choices == lean
    assert activations.plan.measured_peak is not None


def test_the_leanest_plan_is_tried_before_a_run_is_refused(on_device, monkeypatch):
    """All that the predictions lead to runs out of memory; a model of more layers has more such plans."""
    leanest: list[tuple[str, ...]] = []
    trainer, device = on_device(lambda peak: round(1.1 * peak["keep"]), lambda plan: 1.0 if plan in leanest else 9.0)
    leanest.append(trainer.activations._leanest)
    monkeypatch.setattr(activations_module, "MOST_REHEARSALS", 3)
    trainer.rehearse()
    assert len(set(device.rehearsed)) == 3
    assert [trainer.activations.plan.choices] == device.rehearsed[-1:] == leanest


def test_what_never_fits_is_one_sentence_with_numbers(on_device):
    trainer, device = on_device(lambda peak: round(0.75 * min(peak.values())), 1.0)
    with pytest.raises(TrainError, match="GiB are there: lower per_device_train_batch_size from 2 to 1"):
        trainer.rehearse()
    trainer, device = on_device(lambda peak: peak["keep"] - 1000, 1.0, policy="keep")
    with pytest.raises(TrainError, match="set activation_policy to auto"):
        trainer.rehearse()
    assert device.rehearsed == [("keep",) * LAYERS]


def test_a_cpu_is_not_rehearsed_on(make, monkeypatch):
    trainer = make()
    monkeypatch.setattr(activations_module, "rehearse", lambda *_: pytest.fail("rehearsed"))
    trainer.train()
