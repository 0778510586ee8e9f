"""Checks that passed before on the same recipe, data, weights and versions: a sweep need not make them again.

Kept is a full preflight in which nothing failed and no check broke, and of it only what is a function of what it is
kept under. What is asked and in effect, free disk and the learning receipt are looked at in every run.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import PeftModel

from truetune.models.adapters import base_model
from truetune.proof.result import Check

logger = logging.getLogger(__name__)
REUSED = ("supervised tokens", "leak probe", "reference parity", "export")
Found = Mapping[str, list[Check]]


class Proven:
    """The preflight kept in `directory` for `facts`, and for what is in effect in a trainer."""

    def __init__(self, directory: Path, facts: Mapping[str, Any]) -> None:
        self.directory, self.facts = directory, facts

    def find(self, trainer: Any) -> Found:
        """The lines of each check of `REUSED` that was made, or nothing; what is damaged counts for nothing."""
        try:
            checksum, text = self._path(trainer).read_text(encoding="utf-8").split("\n", 1)
        except (OSError, ValueError):
            return {}
        if checksum != _hash(text):
            return {}
        kept = json.loads(text)
        return {
            name: [Check(**check, proven=kept["date"]) for check in checks] for name, checks in kept["checks"].items()
        }

    def keep(self, trainer: Any, found: Found) -> None:
        """Called by one process. A directory that cannot be written costs a sweep time, and nothing else."""
        checks = {name: [_without_date(check) for check in several] for name, several in found.items()}
        text = json.dumps({"date": datetime.now(UTC).date().isoformat(), "checks": checks}, default=str)
        path = self._path(trainer)
        beside = path.with_suffix(f".{os.getpid()}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(f"{_hash(text)}\n{text}", encoding="utf-8")
            os.replace(beside, path)
        except OSError as error:
            logger.debug("The proof cannot be kept in %s: %s", path, error)

    def _path(self, trainer: Any) -> Path:
        return self.directory / f"{_hash(_canonical([self.facts, _in_effect(trainer)]))}.json"


def _in_effect(trainer: Any) -> dict[str, Any]:
    """What decides a check beside the facts: a plan for less memory runs other code, another EOS ends no turn."""
    model, tokenizer = trainer.model, trainer.processing_class
    generation = getattr(base_model(model), "generation_config", None)
    plan = trainer.activations.plan if trainer.activations else None
    return {
        "parts": [(line.part, line.asked, line.in_effect) for line in trainer.report.lines],
        "activations": plan and plan.choices,
        "config": model.config.to_dict(),
        "generation_config": generation and generation.to_dict(),
        "adapter": model.active_peft_config.to_dict() if isinstance(model, PeftModel) else None,
        "special_tokens": [tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.eos_token_id],
    }


def _without_date(check: Check) -> dict[str, Any]:
    return {name: value for name, value in asdict(check).items() if name != "proven"}


def _canonical(value: Any) -> str:
    def plain(other: Any) -> Any:
        return sorted(map(str, other)) if isinstance(other, set | frozenset) else str(other)

    return json.dumps(value, sort_keys=True, default=plain)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
