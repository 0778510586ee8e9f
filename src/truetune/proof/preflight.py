"""All checks that run before a training, in order, cheap ones first."""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from truetune.models.adapters import base_model, embedding_rows
from truetune.proof.effect import check_parts, check_targets, check_weights
from truetune.proof.embeddings import check_tied_head, check_token_rows
from truetune.proof.errors import ProofError
from truetune.proof.excerpt import Document, documents_of, excerpt
from truetune.proof.leaks import check_leaks
from truetune.proof.parity import check_parity
from truetune.proof.proven import REUSED, Proven
from truetune.proof.result import Check, Proof, accepted, failure
from truetune.proof.schedule import check_schedule
from truetune.proof.storage import check_disk, check_export
from truetune.proof.supervision import Documents, Limits, audit
from truetune.proof.untouched import forget_failure, forget_memory, untouched

logger = logging.getLogger(__name__)
LEVELS = ("full", "quick", "off")
EXCERPT = {"full": 1024, "quick": 192}  # tokens that parity and leak probe take
DOCUMENTS = 4


def check_level(level: str) -> None:
    """Raises `ProofError`."""
    if level not in LEVELS:
        raise ProofError(f"preflight {level!r} is unknown: use one of {', '.join(LEVELS)}.")


def preflight(trainer: Any, level: str, allow: list[str], limits: Limits, proven: Proven | None = None) -> Proof:
    """What can be seen of `trainer` right before its first step; a failed check raises nothing here (see `stop_on`).

    The trainer brings `report`, `first_batch()`, `documents_to_audit(everything)`, `planned_steps()`, `fused_outputs`,
    `unpads`, `activations` and `trials`. Weights, gradients, buffers and random states are afterwards what they were.
    `proven`: where checks that need not be made again are found and kept.
    """
    begun = time.perf_counter()
    proof = Proof()
    known = proven.find(trainer) if proven else {}
    made: dict[str, list[Check]] = {}  # and whole

    def run(name: str, check: Callable[[], Check | Sequence[Check] | None]) -> None:
        if name in known:
            proof.checks += known[name]
            return
        found: Check | Sequence[Check] | None
        out_of_memory: Check | None = None
        whole, since = False, time.perf_counter()
        try:
            with untouched(trainer.model):
                found = check()
            whole = True
        except torch.OutOfMemoryError:
            found = out_of_memory = Check(name, "not run: out of device memory", "", "skip")
        except Exception as error:  # no reason to stop a run, and no proof either
            found = _broken(name, error)
        if out_of_memory:  # the frames that held its tensors are gone
            forget_failure(trainer.model)
        several = [] if found is None else [found] if isinstance(found, Check) else found
        several = [accepted(check, allow) for check in several]
        proof.checks += several
        proof.durations[name] = round(time.perf_counter() - since, 3)
        if whole:
            made[name] = several

    run("weights", lambda: check_weights(trainer.model))
    run("adapter targets", lambda: check_targets(trainer.model))
    run("tied head", lambda: check_tied_head(trainer.model))
    run("parts", lambda: check_parts(trainer))
    run("schedule", lambda: check_schedule(trainer))
    run("supervised tokens", lambda: _audit(trainer, level, limits))
    if not trainer.report.stock:
        some: list[Document] = []

        def first_documents() -> None:
            batch = trainer.first_batch()
            some.extend(excerpt([] if batch is None else documents_of(batch), EXCERPT[level], DOCUMENTS))

        if not {"leak probe", "reference parity"} <= set(known):
            run("first documents", first_documents)
        run("leak probe", lambda: check_leaks(trainer, some))
        run("reference parity", lambda: check_parity(trainer, some))
    if level == "full" and not trainer.report.stock:
        for name, trial in trainer.trials.items():
            run(name, functools.partial(trial, trainer))
    run("disk", lambda: check_disk(trainer))
    if level == "full":
        run("export", lambda: check_export(trainer.model))
    forget_memory()
    if proven and not known and not proof.failures and _is_whole(made) and trainer.is_world_process_zero():
        proven.keep(trainer, {name: made[name] for name in REUSED})
    proof.seconds = time.perf_counter() - begun
    return proof


def _broken(name: str, error: Exception) -> Check:
    logger.debug("The check %s broke", name, exc_info=error)
    words = " ".join(str(error).split())[:200]
    mend = "the check itself broke, which proves nothing: report it"
    return Check(name, f"not run: {type(error).__name__}: {words}", "", "warn", mend)


def _is_whole(made: Mapping[str, Sequence[Check]]) -> bool:
    """Whether nothing broke, and the first documents, which another seed has others of, were enough for the probes."""
    probes = ("leak probe", "reference parity")
    return {*REUSED, "first documents"} <= set(made) and all(c.verdict != "skip" for name in probes for c in made[name])


def stop_on(failures: Sequence[Check]) -> None:
    """Raises `ProofError` with the first failure's cause and mend, and how many more there are."""
    if failures:
        more = f" ({len(failures) - 1} more checks failed)" if len(failures) > 1 else ""
        raise ProofError(failure(failures[0]).removesuffix(".") + more + ".")


def _audit(trainer: Any, level: str, limits: Limits) -> list[Check]:
    found = trainer.documents_to_audit(everything=level == "full")
    if found is None:
        return [Check("supervised tokens", "not run before the first steps, which show what a stream or a collator of "
                      "your own gives", "", "skip")]  # fmt: skip
    documents, evaluation, counts = found
    return _audited(trainer, documents, level, limits, evaluation, counts)


def audit_batches(trainer: Any, batches: Sequence[Mapping[str, Any]], level: str, limits: Limits) -> list[Check]:
    """The audit of what was trained, where it was not known before."""
    try:
        found = [document for batch in batches for document in documents_of(batch)]
        ids, labels = ([np.array(document[name], np.int32) for document in found] for name in ("input_ids", "labels"))
        checks = _audited(trainer, Documents(ids, labels), level, limits, None, None)
    except Exception as error:  # a collator of the user's own may give anything
        checks = [_broken("supervised tokens", error)]
    return [replace(check, seen=f"{check.seen} (of the first steps)") for check in checks]


def _audited(
    trainer: Any, documents: Documents, level: str, limits: Limits, evaluation: Documents | None, counts: Any
) -> list[Check]:
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)  # a vision model's processor
    ends = getattr(getattr(base_model(trainer.model), "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    checks = audit(
        documents, tokenizer, limits, stops=sorted(stops), max_length=trainer.args.max_length,
        embeddings=embedding_rows(trainer.model), counts=counts, evaluation=evaluation, strict=level == "full",
    )  # fmt: skip
    return [*checks, check_token_rows(trainer.model, tokenizer, documents)]
