"""Checkpoints of the trainer in TRL's place: a half-written one is never gone on from."""

import pytest

from truetune.train.checkpoints import checkpoint_step
from truetune.train.errors import TrainError


def test_resume_from_checkpoint_passes_over_what_was_cut_short(make, tmp_path):
    fields = {"output_dir": str(tmp_path / "run"), "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = make(fields)
    whole.train()
    cut_short = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    cut_short.write_bytes(cut_short.read_bytes()[:100])
    with pytest.raises(TrainError, match=r"checkpoint-6 was cut short \(its optimizer.pt is not whole\)"):
        make(fields).train(resume_from_checkpoint=str(cut_short.parent))
    resumed = make(fields)
    resumed.train(resume_from_checkpoint=True)
    history = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (resumed, whole)]
    assert history[0] == history[1] and resumed.report.fused_losses == 2


def test_a_save_over_an_earlier_checkpoint_is_not_taken_for_it(make, tmp_path, monkeypatch):
    fields = {"output_dir": str(tmp_path / "run"), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(fields).train()
    assert checkpoint_step(tmp_path / "run" / "checkpoint-1") == 1
    again = make(fields)
    monkeypatch.setattr(
        again, "_save_optimizer_and_scheduler", lambda output_dir: 1 / 0
    )  # as a kill there would end it
    with pytest.raises(ZeroDivisionError):
        again.train()
    assert checkpoint_step(tmp_path / "run" / "checkpoint-1") is None
