"""A trainer's proof: the checks before its first step, the receipt after the first ones, and proof.json."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from truetune.proof.preflight import audit_batches, check_level, preflight, stop_on
from truetune.proof.proven import Proven
from truetune.proof.receipt import LearningReceipt
from truetune.proof.result import Check, Proof, accepted
from truetune.proof.supervision import Limits
from truetune.proof.watch import Watch
from truetune.train.config import own_setting
from truetune.train.optim import embedding_parameters

logger = logging.getLogger(__name__)
PROOF_FILE = "proof.json"
AUDITED_BATCHES = 64


class Proving(TrainerCallback):
    """`SFTConfig.preflight` of one trainer. `proof`: what was found so far; `proven`: what earlier runs found."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.level, self.allow = (own_setting(trainer.args, name) for name in ("preflight", "allow"))
        check_level(self.level)
        self.limits = Limits.of(own_setting(trainer.args, "preflight_limits"))
        self.proof = Proof()
        self.proven: Proven | None = None
        self.watch = Watch()
        self.unaudited: list[Mapping[str, Any]] | None = None  # the first micro-batches, where data is not known before

    def preflight(self) -> Proof:
        """The checks before a training. Nothing that it depends on changes, and a failure raises nothing here."""
        self.proof = preflight(self.trainer, self.level, self.allow, self.limits, self.proven)
        self._print(self.proof)
        return self.proof

    def begin(self) -> None:
        """Called right before training. Raises `ProofError` where a check fails."""
        if self.level == "off":
            return
        stop_on(self.preflight().failures)
        audited = [check.verdict != "skip" for check in self.proof.checks if check.name == "supervised tokens"]
        self.unaudited = None if all(audited) else []
        for callback in (Proving, LearningReceipt, Watch):
            self.trainer.remove_callback(callback)  # an earlier training's
        self.watch = Watch()
        self.trainer.add_callback(self)
        self.trainer.add_callback(self.watch)
        self.trainer.add_callback(LearningReceipt(self.trainer.model, self._on_receipt))

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        rate = own_setting(args, "embedding_learning_rate")
        if rate is not None and optimizer is not None and not self.trainer.report.stock:
            self._add([check_embedding_rate(self.trainer.model, optimizer, rate)])
        self.save()

    def on_save(self, args, state, control, **kwargs):
        self._save_notes()

    def on_train_end(self, args, state, control, **kwargs):
        self._save_notes()

    def _save_notes(self) -> None:
        self.proof.notes = self.watch.notes
        self.save()

    def see(self, inputs: Mapping[str, Any]) -> None:
        """A micro-batch of the training."""
        if self.level != "off":
            kept = self.watch.see(inputs)
            if self.unaudited is not None and len(self.unaudited) < AUDITED_BATCHES:
                self.unaudited.append(kept)

    def save(self) -> None:
        args = self.trainer.args
        if not args.should_save or args.output_dir is None:
            return
        path = Path(args.output_dir) / PROOF_FILE
        beside = path.with_name(f".{PROOF_FILE}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(self.proof.to_dict(), indent=1, default=str) + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:  # a run that saves nothing may have nowhere to
            logger.warning("%s cannot be written: %s.", path, error.strerror)

    def _on_receipt(self, checks: list[Check]) -> None:
        self._print(Proof(checks), title="Learning receipt")
        self._add(checks)
        if self.unaudited:
            found = [
                accepted(c, self.allow) for c in audit_batches(self.trainer, self.unaudited, self.level, self.limits)
            ]
            self.unaudited = None
            self._print(Proof(found), title="Audit of the first steps")
            self._add(found)

    def _add(self, checks: list[Check]) -> None:
        checks = [accepted(check, self.allow) for check in checks]
        self.proof.checks += checks
        self.save()
        stop_on([check for check in checks if check.verdict == "fail"])

    def _print(self, proof: Proof, title: str = "") -> None:
        if not self.trainer.is_world_process_zero():
            return
        Console(stderr=True).print(proof.table(title))
        for warning in proof.warnings():
            logger.warning("%s.", warning)


def check_embedding_rate(model: Any, optimizer: Any, asked: float) -> Check:
    """The groups of an optimizer give the schedule's start as `initial_lr`, and `lr` where there is no schedule."""
    embeddings = {id(parameter) for parameter in embedding_parameters(model)}
    rates = {
        id(parameter): group.get("initial_lr", group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = sorted({rates.get(key, 0.0) for key in embeddings})
    right = found == [asked]
    return Check(
        "learning rates",
        f"{len(embeddings)} tensors of embeddings and head at {' and '.join(f'{rate:.3g}' for rate in found)}",
        f"{asked:.3g}",
        "pass" if right else "fail",
        mend="" if right else "embedding_learning_rate does not reach the optimizer: let the trainer make it",
    )
