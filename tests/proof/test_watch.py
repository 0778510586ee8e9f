"""While it runs: a loss that is not finite stops with its batches, and what is strange is named."""

import gc
import itertools
import json
import mmap
import types

import pytest
import torch
from transformers import TrainerCallback

from truetune.proof import watch as watch_module
from truetune.proof.drift import CLIMB, LEAST_SECONDS, SAMPLE, SETTLED, WARM_UP, Climb, Throughput, process_bytes
from truetune.proof.errors import ProofError
from truetune.proof.excerpt import documents_of
from truetune.proof.watch import Watch, load_batches


class Poison(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_with_its_batches(make, tmp_path):
    trainer = make(preflight="quick", callbacks=[Poison()], gradient_accumulation_steps=2, max_steps=6,
                   logging_nan_inf_filter=False, allow=["changed_frozen", "untrained_tensors"])  # fmt: skip
    seen = []
    compute_loss = trainer.compute_loss

    def remembered(model, inputs, **keywords):
        seen.append(inputs["input_ids"].clone())
        return compute_loss(model, inputs, **keywords)

    trainer.compute_loss = remembered
    with pytest.raises(ProofError, match=r"loss, gradient norm, entropy of step 3 is not finite.*stopped_batch_3_0"):
        trainer.train()
    batches = load_batches(tmp_path / "out" / "stopped_batch_3_0.safetensors")
    assert len(batches) == 2
    assert all(torch.equal(batch["input_ids"], ids) for batch, ids in zip(batches, seen[-2:], strict=True))
    assert all(documents_of(batch) for batch in batches)


def test_a_loss_that_the_trainer_filters_is_seen_all_the_same(make):
    with pytest.raises(ProofError, match="entropy of step 3 is not finite"):
        make(preflight="quick", callbacks=[Poison()], max_grad_norm=0, max_steps=6,
             allow=["changed_frozen", "untrained_tensors"]).train()  # fmt: skip


def logged(watch, losses, rate=1e-4):
    for step, loss in enumerate(losses, 1):
        state = types.SimpleNamespace(global_step=step, max_steps=1000, is_world_process_zero=True)
        watch.on_log(
            types.SimpleNamespace(fp16=False, device=torch.device("cpu")),
            state,
            None,
            {"loss": loss, "grad_norm": 1.0, "learning_rate": rate},
        )


def test_a_spike_is_named_and_noise_is_not():
    watch = Watch()
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0))
    logged(watch, (2 - torch.arange(200) / 400 + 0.05 * noise).tolist())
    assert not watch.notes
    logged(watch, [4.0])
    assert [note["kind"] for note in watch.notes] == ["loss spike"]


def test_packs_that_are_dearer_every_time_are_no_spikes():
    watch = Watch()
    logged(watch, [3.0 if step % 20 == 7 else 0.5 for step in range(200)])
    assert not watch.notes
    logged(watch, [4.0])
    assert [note["kind"] for note in watch.notes] == ["loss spike"]


def test_a_learning_rate_of_zero_is_named_once():
    watch = Watch()
    logged(watch, [2.0] * 20, rate=0.0)
    assert [note["kind"] for note in watch.notes] == ["dead learning rate"]


def test_any_other_file_is_refused(tmp_path):
    for name, content in (("a", b""), ("b", b"{}"), ("c", b"\x08\0\0\0\0\0\0\0{}      ")):
        (tmp_path / name).write_bytes(content)
        if name != "c":
            with pytest.raises(ProofError, match="holds no saved batches"):
                load_batches(tmp_path / name)
    with pytest.raises(ProofError, match="holds no saved batches"):
        load_batches(tmp_path / "nowhere")


# -- drift -------------------------------------------------------------------------------------------------------------

JUDGED = WARM_UP + 2 * SAMPLE  # intervals after which throughput is judged


def own_pages(mebibytes):
    """Not from the heap, which would not grow where other tests freed as much."""
    pages = mmap.mmap(-1, mebibytes * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


class Leak(TrainerCallback):
    """Keeps 6 MiB of each step."""

    def __init__(self):
        self.kept = []

    def on_step_end(self, args, state, control, **kwargs):
        self.kept.append(own_pages(6))


class Clock(TrainerCallback):
    """A step takes a tenth of a second, from `slow` on `more` in addition; in the run's second half an evaluation and a
    checkpoint take a second."""

    def __init__(self):
        self.now, self.slow, self.more = 0.0, float("inf"), 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 0.1 + self.more * (state.global_step >= self.slow)

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += state.global_step > args.max_steps / 2

    on_save = on_evaluate


def kinds(trainer):
    return [note["kind"] for note in trainer.proof.notes]


def test_a_leak_is_named_in_the_log_and_in_the_proof(make, tmp_path, caplog):
    gc.collect()  # what other tests left is not to be freed meanwhile
    trainer = make(preflight="quick", max_steps=SETTLED + CLIMB + 4, callbacks=[Leak()])
    trainer.train()
    assert kinds(trainer).count("host memory grows") == 1
    (message,) = [record.getMessage() for record in caplog.records if "host memory grows" in record.getMessage()]
    assert "the process's memory grew from" in message and "something keeps what each step makes" in message
    notes = json.loads((tmp_path / "out" / "proof.json").read_text())["notes"]
    assert "host memory grows" in [note["kind"] for note in notes]


def test_a_leak_on_the_device_is_named(monkeypatch):
    """A device whose tensors grow by 16 MiB a log; there is none here."""
    used = iter(range(10**9, 10**12, 16 * 2**20))
    monkeypatch.setattr(watch_module, "device_bytes", lambda device: next(used))
    monkeypatch.setattr(watch_module, "process_bytes", lambda: 10**9)
    watch = Watch()
    logged(watch, [2.0] * (SETTLED + CLIMB))
    assert not watch.notes
    logged(watch, [2.0] * 3)
    assert [note["kind"] for note in watch.notes] == ["device memory grows"]


@pytest.mark.parametrize(
    "memory",
    [
        [100 + 30 * (i % 2) for i in range(80)],  # batches of two sizes
        [100 + 400 * (i >= 30) for i in range(80)],  # a first evaluation
        [100 + 40 * min(i, SETTLED + CLIMB - 12) for i in range(80)],  # a long start
        [100 + 40 * (i % 10) for i in range(80)],  # a buffer that fills and empties
        [100 + 20 * (i % 31) for i in range(200)],  # and one that fills slowly
        [100 + 0.2 * i for i in range(400)],  # the trainer's log
    ],
    ids=["batches", "evaluation", "start", "buffer", "slow buffer", "log"],
)
def test_memory_that_does_not_climb_for_long_is_no_leak(memory):
    climb = Climb("device memory")
    assert not [said for mib in memory if (said := climb.see(int(mib * 2**20)))]


def test_memory_of_files_is_not_counted(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(64 * 2**20))
    before = process_bytes()
    mapped = torch.from_file(str(path), size=64 * 2**20, dtype=torch.uint8)
    assert int(mapped.sum()) == 0  # every page has been read
    assert process_bytes() - before < 16 * 2**20
    kept = torch.ones(16 * 2**20)
    assert process_bytes() - before > 48 * 2**20, kept.shape


class _Hoarding(torch.utils.data.Dataset):
    """Keeps 4 MiB a row, in whichever process reads it."""

    def __init__(self):
        self.kept = []

    def __len__(self):
        return 80

    def __getitem__(self, row):
        self.kept.append(own_pages(4))
        return row


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_workers_of_a_data_loader_keep_is_counted(workers):
    rows = iter(torch.utils.data.DataLoader(_Hoarding(), batch_size=None, num_workers=workers))
    assert next(rows) == 0
    before = process_bytes()
    assert list(itertools.islice(rows, 60)) == list(range(1, 61))
    assert process_bytes() - before > 50 * 4 * 2**20  # up to six rows are read ahead


@pytest.fixture
def hasty(monkeypatch):
    """Runs of seconds are judged like those of hours, by a clock that other work on this machine does not move."""
    monkeypatch.setattr(watch_module, "Throughput", lambda: Throughput(least_seconds=0.0))
    clock = Clock()
    monkeypatch.setattr(watch_module, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_run_that_slows_down_is_named_once(make, caplog, hasty):
    hasty.slow, hasty.more = JUDGED, 0.3
    trainer = make(preflight="quick", max_steps=JUDGED + SAMPLE, callbacks=[hasty])
    trainer.train()
    assert kinds(trainer) == ["slower"]
    assert any("were usual, with steps of like size" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_evaluations_and_checkpoints_are_no_drift(make, hasty, logging_steps):
    trainer = make(
        preflight="quick", max_steps=logging_steps * (JUDGED + 2 * SAMPLE), logging_steps=logging_steps, evaluate=True,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=2, save_total_limit=1,
    )  # fmt: skip
    trainer.callback_handler.callbacks.insert(0, hasty)  # so that the watch is asked after it
    trainer.train()
    assert "slower" not in kinds(trainer) and "host memory grows" not in kinds(trainer)


def intervals(rates, tokens=1000.0, **settings):
    throughput = Throughput(**settings)
    sizes = tokens if isinstance(tokens, list) else [tokens] * len(rates)
    return sum(throughput.see(size, 1, size / rate) is not None for rate, size in zip(rates, sizes, strict=True))


def test_what_throughput_is_told():
    assert intervals([10] * WARM_UP + [100] * 60) == 0  # a slow start is not what was usual
    assert intervals([1000] * WARM_UP + [100] * 60) == 0  # nor a fast one
    noise = (100 + 30 * torch.randn(400, generator=torch.Generator().manual_seed(0))).clamp(20).tolist()
    assert intervals(noise) == 0
    assert intervals([100] * 60 + [10] * 6 + [100] * 40) == 0  # a pause
    assert intervals([100] * 60 + [50] * 40) == 1
    assert intervals([100] * 60 + [50] * 40 + [100] * 40 + [50] * 40) == 2  # recovered meanwhile
    assert intervals([100] * 60 + [50, 50, 50, 62, 62, 62] * 40) == 1  # about the limit
    assert intervals([100 - 0.2 * i for i in range(300)]) == 1  # bit by bit
    assert intervals([100] * 60 + [50] * 40, [1000.0] * 60 + [400.0] * 40) == 0  # smaller batches
    sizes = [1000.0 * (1 + i % 3) for i in range(300)]
    assert intervals([size / 10 for size in sizes], sizes) == 0  # three sizes in turn


def test_a_minute_of_other_work_on_the_machine_is_no_drift():
    quick = [10_000] * 2000  # steps of a tenth of a second
    assert intervals(quick + [3_000] * 80 + quick) == 0  # for 27 seconds
    assert intervals(quick + [3_000] * 300) == 1
    assert intervals(quick + [3_000] * 80, least_seconds=0.0) == 1 and LEAST_SECONDS == 4
