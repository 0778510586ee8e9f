"""What a run will do later, tried before its first step: its largest batch, an evaluation, a checkpoint and its reload.

Part of `preflight="full"`. Nothing that training depends on changes: see `untouched` and `_on_copies`.
"""

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from truetune.proof.result import Check, Verdict
from truetune.proof.storage import MOST_BYTES
from truetune.proof.untouched import forget_failure
from truetune.train.errors import TrainError
from truetune.train.rehearsal import HOOKED, forward_backward, forward_evaluating

MOST_CPU_FLOPS = 2e12  # of a batch that is tried on a CPU: less than a minute on two cores


def check_largest_batch(trainer: Any) -> Check:
    """Forward and backward, without an optimizer step."""
    return _check_batch(trainer, "largest batch", trainer.train_dataset, evaluation=False)


def check_evaluation_batch(trainer: Any) -> Check | None:
    """Forward, as the evaluation takes it; None where there is nothing to evaluate on."""
    if trainer.eval_dataset is None:
        return None
    return _check_batch(trainer, "evaluation step", trainer.eval_dataset, evaluation=True)


def _check_batch(trainer: Any, name: str, dataset: Any, evaluation: bool) -> Check:
    limit = "runs, with a finite loss"
    batch = None if trainer.first_batch() is None else trainer.largest_batch(evaluation=evaluation)
    if batch is None:
        return Check(name, "not run: the data is not known before it is read", limit, "skip")
    tokens = batch["input_ids"].numel()
    flops = (2 if evaluation else 6) * tokens * sum(parameter.numel() for parameter in trainer.model.parameters())
    if trainer.args.device.type == "cpu" and flops > MOST_CPU_FLOPS:
        return Check(name, f"not run: {tokens:,} tokens are {flops / 1e12:,.0f} TFLOP on a CPU", limit, "skip")
    smaller = "lower per_device_eval_batch_size" if evaluation else "lower per_device_train_batch_size or max_length"
    loss: float | None
    try:
        if evaluation:
            loss = forward_evaluating(trainer, batch, trainer.evaluates_with_logits())
        else:
            loss = forward_backward(trainer, batch)
    except torch.OutOfMemoryError:
        loss = None
    if loss is None:  # the frames that held its tensors are gone
        forget_failure(trainer.model)
        seen, mend = f"{tokens:,} tokens run out of device memory", smaller
    else:
        seen = f"{tokens:,} tokens, loss {loss:.4g}"
        mend = "" if math.isfinite(loss) else "look at the longest rows, or load the weights in fp32"
    return Check(
        name, seen, limit, "fail" if mend else "pass", mend, allow=name.replace(" ", "_") if mend else "",
        details={"tokens": tokens, "loss": loss},
    )  # fmt: skip


def check_checkpoint(trainer: Any) -> Check:
    """Saves one after a step on copies of the weights, and goes on from it in a directory that is then removed."""
    name, limit = "checkpoint", "weights and optimizer state reloaded bit for bit"
    why = _why_not_tried(trainer)
    if why:
        return Check(name, f"not tried: {why}", limit, "skip")
    with _on_copies(trainer) as weights, tempfile.TemporaryDirectory() as directory:
        trainer.args.output_dir, trainer.args.push_to_hub = directory, False
        try:
            _make_optimizer(trainer)
        except TrainError as error:
            return Check(name, "the optimizer cannot be made", limit, "fail", str(error).removesuffix("."))
        saved = {key: parameter.detach().clone() for key, parameter in weights.items()}
        state = None if trainer.optimizer is None else copy.deepcopy(trainer.optimizer.state_dict())
        trainer._save_checkpoint(trainer.model, None)
        (checkpoint,) = Path(directory).glob("checkpoint-*")
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        with torch.no_grad():
            for parameter in weights.values():
                parameter.zero_()
        trainer.optimizer = trainer.lr_scheduler = None
        _make_optimizer(trainer, step=False)
        trainer._load_from_checkpoint(str(checkpoint))
        trainer._load_optimizer_and_scheduler(str(checkpoint))
        trainer._load_rng_state(str(checkpoint))
        lost = [key for key, parameter in weights.items() if not _same(parameter, saved[key])]
        if state is not None and not _same(trainer.optimizer.state_dict(), state):
            lost.append("the optimizer's state")
    verdict: Verdict = "fail" if lost else "pass"
    held = "weights" if state is None else "weights and optimizer"
    return Check(
        name,
        f"{held} of {len(weights):,} tensors, {size / 2**20:.1f} MiB"
        + (f"; lost or changed: {', '.join(lost[:3])}" if lost else ""),
        limit, verdict,
        mend="a run that goes on from its checkpoint is another one: report the model and the optimizer"
        if lost else "",
        allow="checkpoint" if lost else "",
        details={"bytes": size, "lost": lost[:50]},
    )  # fmt: skip


def _why_not_tried(trainer: Any) -> str:
    args, weights = trainer.args, _checkpointed(trainer.model)
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return "save_strategy is no"
    if trainer.accelerator.num_processes > 1:
        return "several processes write one"
    size = sum(parameter.numel() * (parameter.element_size() + 8) for parameter in weights.values())
    return f"about {size / 2**30:.1f} GiB to write" if size > MOST_BYTES else ""


def _checkpointed(model: nn.Module) -> dict[str, nn.Parameter]:
    adapter = isinstance(model, PeftModel)
    return {name: p for name, p in model.named_parameters() if p.requires_grad or not adapter}


@contextmanager
def _on_copies(trainer: Any) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters that a checkpoint holds, with copies of their values; those themselves are put back, and so is
    whatever the trainer, its arguments and the model's configuration were."""
    weights = _checkpointed(trainer.model)
    values = {name: parameter.data for name, parameter in weights.items()}
    holders = [vars(trainer), vars(trainer.args), vars(trainer.model.config), vars(trainer.report)]
    had = [dict(holder) for holder in holders]
    trainer.state = copy.deepcopy(trainer.state)
    trainer._print = lambda table: None  # the optimizer's groups are shown when the run makes them
    try:
        for parameter in weights.values():
            parameter.data = parameter.data.clone()
        yield weights
    finally:
        for name, parameter in weights.items():
            parameter.grad = None
            parameter.data = values[name]
        for holder, before in zip(holders, had, strict=True):
            holder.clear()
            holder.update(before)


def _make_optimizer(trainer: Any, step: bool = True) -> None:
    """As the run will make it, and a step, so that it has a state; not where the user has made one."""
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.args.save_only_model or trainer.optimizer is not None or any(word in name for word in HOOKED):
        trainer.args.save_only_model, trainer.optimizer = True, None
        return
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    optimizer: Any = trainer.optimizer
    if not step:
        return
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def _same(one: Any, other: Any) -> bool:
    if isinstance(other, Tensor):
        bits = [value.detach().cpu().contiguous().view(-1).view(torch.uint8) for value in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
