"""Checkpoints of the trainer in TRL's place: a half-written one is never gone on from."""

import pytest
import transformers
from torch.nn.modules.module import _IncompatibleKeys

from pairs import llama
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


def test_a_tied_weight_is_not_called_missing_and_a_lost_one_is(make, tokenizer, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", warned.append)
    fields = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(fields, model=llama(tokenizer, tie_word_embeddings=True))
    trainer.train()
    trainer._load_from_checkpoint(str(tmp_path / "run" / "checkpoint-1"))
    assert not any("missing keys" in text for text in warned)
    trainer._issue_warnings_after_load(_IncompatibleKeys(["lm_head.weight", "model.norm.weight"], []))
    assert warned[-1] == "There were missing keys in the checkpoint model loaded: ['model.norm.weight']."
