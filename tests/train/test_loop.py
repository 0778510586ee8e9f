"""Transformers' loop without its waits: the same logs."""

import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import truetune
from pairs import SETTINGS, llama
from truetune.data.collate import UnpaddingCollator
from truetune.train.loop import QuietTrainer, copy_behind_work

NOT_FINITE = {1: float("nan"), 4: float("inf"), 7: float("-inf"), 11: float("nan")}  # by micro-batch, of 12


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


class BrokenAndCounted(Broken):
    """What overrides `floating_point_ops`, as Transformers' documentation has it, may never say that it was called."""

    def floating_point_ops(self, inputs):
        return 7


class BrokenInBf16(Broken):
    """Whose losses leave `training_step` in a dtype in which the mean so far cannot be held."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs).bfloat16()


class BrokenInBf16AndLookedAt(BrokenInBf16, BrokenAndLookedAt):
    pass


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
    assert logged(make(BrokenAndCounted)) == theirs
    unfiltered = logged(make(Broken, logging_nan_inf_filter=False))
    assert not any(torch.tensor(loss).isfinite() for loss, _ in unfiltered)


def test_the_mean_that_stands_for_a_loss_is_not_rounded_to_its_dtype(make):
    assert logged(make(BrokenInBf16)) == logged(make(BrokenInBf16AndLookedAt))


def test_a_wrapper_of_one_trainers_training_step_sees_losses_as_they_are(make):
    trainer = make(Broken)
    training_step, seen = trainer.training_step, []

    def looked_at(*args, **kwargs):
        seen.append(training_step(*args, **kwargs))
        return seen[-1]

    trainer.training_step = looked_at
    assert logged(trainer) == logged(make(BrokenAndLookedAt))
    assert [number for number, loss in enumerate(seen) if not loss.isfinite()] == list(NOT_FINITE)


class Reads(TorchDispatchMode):
    """Counts what would ask a GPU for numbers."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def reads(trainer):
    """From a step's first forward pass to its clipped gradients, in all steps."""
    mode = Reads()

    class Counts(TrainerCallback):
        def on_step_begin(self, *_, **__):
            mode.__enter__()

        def on_pre_optimizer_step(self, *_, **__):
            mode.__exit__(None, None, None)

    trainer.add_callback(Counts())
    assert len(logged(trainer)) == 3
    return mode.count


@pytest.fixture
def nothing_ahead(monkeypatch):
    """What collating reads, it reads on the host."""
    monkeypatch.setattr(truetune.SFTTrainer, "reads_ahead", lambda self: False)


@pytest.mark.parametrize("fields", [{}, {"packing": True}, {"preflight": "quick"}], ids=str)
def test_nothing_is_read_from_the_device_before_the_optimizer_is_launched(make, nothing_ahead, fields):
    assert reads(make(truetune.SFTTrainer, **fields)) == 0


def test_transformers_filter_is_seen_to_read_each_loss(make, nothing_ahead):
    trainer = make(truetune.SFTTrainer)
    trainer.floating_point_ops = lambda inputs: 0
    assert reads(trainer) == 2 * 12  # is it NaN, is it infinite


def test_arguments_are_the_users_whenever_they_are_read_and_after_a_failure(make, monkeypatch):
    read = []

    class Looks(TrainerCallback):
        def on_step_begin(self, args, *_, **__):
            read.append(args.logging_nan_inf_filter)

        def on_step_end(self, args, state, *_, **__):
            read.append(args.logging_nan_inf_filter)
            if state.global_step == 3:
                raise KeyError

    trainer = make(truetune.SFTTrainer)
    trainer.add_callback(Looks())
    with pytest.raises(KeyError):
        trainer.train()
    assert read == [True] * 6

    monkeypatch.setattr(QuietTrainer, "floating_point_ops", lambda self, inputs: 1 / 0)  # which takes the filter back
    trainer = make(truetune.SFTTrainer)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.args.logging_nan_inf_filter


# -- batches that are made ahead


class Order(TrainerCallback):
    """What happened one after the other: a batch is collated, an optimizer step begins, a step ends."""

    def __init__(self, monkeypatch, broken=None):
        self.seen, collate = [], UnpaddingCollator.__call__

        def seen_collate(collator, features):
            self.seen.append("batch")
            if self.seen.count("batch") == broken:
                raise ValueError("a row cannot be read")
            return collate(collator, features)

        monkeypatch.setattr(UnpaddingCollator, "__call__", seen_collate)

    def on_pre_optimizer_step(self, *_, **__):
        self.seen.append("optimizer")

    def on_step_end(self, *_, **__):
        self.seen.append("end")


def trained(make, order):
    trainer = make(truetune.SFTTrainer, max_steps=5)
    trainer.add_callback(order)
    order.seen.clear()
    trainer.train()
    return trainer


def test_the_next_batches_are_made_before_the_optimizer_is_launched_and_no_others(make, monkeypatch):
    runs = {}
    for ahead in (True, False):
        with monkeypatch.context() as patch:
            if not ahead:
                patch.setattr(truetune.SFTTrainer, "reads_ahead", lambda self: False)
            order = Order(patch)
            runs[ahead] = order.seen, [entry.get("loss") for entry in trained(make, order).state.log_history]
    (ahead, losses), (plain, plain_losses) = runs[True], runs[False]
    # Accelerate itself is one batch ahead, to know the last one.
    assert plain == ["batch"] * 3 + (["optimizer", "end"] + ["batch"] * 2) * 4 + ["optimizer", "end"]
    assert ahead == ["batch"] * 3 + (["batch"] * 2 + ["optimizer", "end"]) * 4 + ["optimizer", "end"]
    assert losses == plain_losses


def test_what_cannot_be_read_stops_the_step_that_needs_it(make, monkeypatch):
    order = Order(monkeypatch, broken=6)
    with pytest.raises(ValueError, match="cannot be read"):
        trained(make, order)
    assert order.seen.count("end") == 2  # of Accelerate's batch ahead, too


def test_epochs_of_uneven_steps_are_read_whole(make, data):
    trainer = make(truetune.SFTTrainer, max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=5)
    trainer.train()
    batches = -(-len(data) // trainer.args.per_device_train_batch_size)
    assert trainer.report.packed_batches == 2 * batches
    assert batches % 5


def test_no_batch_is_lost_where_the_iterator_is_another_in_every_step(make):
    class Wraps(truetune.SFTTrainer):
        def get_batch_samples(self, epoch_iterator, *arguments):
            return super().get_batch_samples(map(dict, epoch_iterator), *arguments)

    losses = [logged(make(trainer_class)) for trainer_class in (Wraps, truetune.SFTTrainer)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_what_others_may_see_is_not_read_ahead(make, data):
    assert make(truetune.SFTTrainer).reads_ahead()
    assert not make(truetune.SFTTrainer, dataloader_num_workers=1).reads_ahead()
    trainer = make(truetune.SFTTrainer)
    trainer.train_dataset.set_transform(lambda rows: rows)
    assert not trainer.reads_ahead()
    trainer = make(truetune.SFTTrainer)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: collate(rows)
    assert not trainer.reads_ahead()

    class OwnLoader(truetune.SFTTrainer):
        def get_train_dataloader(self):
            return super().get_train_dataloader()

    assert not make(OwnLoader).reads_ahead()


@pytest.mark.parametrize(
    ("device", "pinned", "waits"), [("cuda", True, False), ("cuda", False, True), ("cpu", True, True)]
)
def test_batches_in_pinned_memory_are_copied_behind_a_gpus_work(device, pinned, waits):
    loader = DataLoaderShard([0], device=torch.device(device), pin_memory=pinned)
    assert loader._non_blocking is False  # Accelerate's name for it, and its default
    copy_behind_work(loader)
    assert loader._non_blocking is not waits
