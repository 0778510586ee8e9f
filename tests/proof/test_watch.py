"""While it runs: a loss that is not finite stops with its batches, and what is strange is named."""

import types

import pytest
import torch
from transformers import TrainerCallback

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
            types.SimpleNamespace(fp16=False), state, None, {"loss": loss, "grad_norm": 1.0, "learning_rate": rate}
        )


def test_a_spike_is_named_and_noise_is_not():
    watch = Watch()
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0))
    logged(watch, (2 - torch.arange(200) / 400 + 0.05 * noise).tolist())
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
