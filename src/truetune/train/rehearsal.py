"""The largest batch, forward and backward, before the first step: what it needs, how long a layer takes, no trace left.

There is no optimizer yet and no DDP round the model, so ranks do not wait for each other: one may run out of memory
where another does not. What they found they compare afterwards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from truetune.models.adapters import embedding_rows
from truetune.models.plan import fused_layers
from truetune.proof.supervision import OTHER_TOKENIZER
from truetune.proof.untouched import forget_failure, untouched
from truetune.train.checkpointing import checkpointed_as_in_training
from truetune.train.errors import TrainError

NOT_REHEARSED = "not rehearsed: the lengths of the data are not known before it is read"
HOST_COPY = 2**26  # bytes of the copy that is timed
HOOKED = ("layerwise", "lomo")  # optimizers that step in hooks of the parameters, which cannot be taken back


@dataclass(frozen=True)
class Rehearsed:
    """`peak`: device bytes, None where memory ran out; `before`: those in use when it began. `layer_seconds`: of one
    layer's forward pass, None without a GPU."""

    peak: int | None
    before: int
    layer_seconds: float | None = None


def rehearse(trainer: Any, batch: Mapping[str, Any]) -> Rehearsed:
    """`batch` forward and backward with `trainer`'s model, loss and precision; its gradients are dropped.

    Raises `TrainError` for token ids without an embedding, of which a GPU would die.
    """
    if int(batch["input_ids"].max()) >= embedding_rows(trainer.model):
        raise TrainError(f"The data has token ids that the model has no embedding for: {OTHER_TOKENIZER}.")
    device = next(trainer.model.parameters()).device
    if device.type != "cuda":
        with untouched(trainer.model):
            forward_backward(trainer, batch)
        return Rehearsed(0, 0)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        clock = _LayerClock(trainer.model)
        peak = seconds = None
        with untouched(trainer.model):
            try:
                forward_backward(trainer, batch)
                torch.cuda.synchronize()
                peak, seconds = torch.cuda.max_memory_allocated(), clock.seconds()
            except torch.cuda.OutOfMemoryError:
                pass  # the frames that hold its tensors are gone once this block is left
            finally:
                clock.stop()
        if peak is None:
            forget_failure(trainer.model)
        return Rehearsed(peak, before, seconds)


def rehearse_unplanned(trainer: Any) -> str:
    """The largest batch of a trainer whose activations nobody plans; says why where it is not tried.

    Raises `TrainError` where memory runs out. The optimizer's state, of which nobody knows much, comes on top.
    """
    args, batch = trainer.args, trainer.largest_batch()
    if batch is None:
        return NOT_REHEARSED
    if why := _why_not_tried(trainer, batch):
        return f"not rehearsed: {why}"
    ran_out = rehearse(trainer, batch).peak is None
    if not bool(trainer.accelerator.gather(torch.tensor([ran_out], device=args.device)).any()):
        return ""
    size = args.per_device_train_batch_size
    smaller = f"lower per_device_train_batch_size from {size}" if size > 1 else "train on shorter rows (max_length)"
    mend = smaller if args.gradient_checkpointing else f"set gradient_checkpointing=True, or {smaller}"
    tokens = batch["input_ids"].numel()
    raise TrainError(f"The largest batch ({tokens:,} tokens) runs out of device memory: {mend}.")


def _why_not_tried(trainer: Any, batch: Mapping[str, Any]) -> str:
    args = trainer.args
    optimizer = str(getattr(args.optim, "value", args.optim))
    if not {"input_ids", "labels"} <= batch.keys():
        return "its batches have no input_ids or labels"
    if args.n_gpu > 1 or next(trainer.model.parameters()).device.type != args.device.type:
        return "the model is on another device, or on several"
    if any(name in optimizer for name in HOOKED):
        return f"{optimizer} drops gradients while they are made"
    return ""


def rehearse_evaluation(trainer: Any, batch: Mapping[str, Any], full_logits: bool) -> bool:
    """Whether a batch without gradients fits."""
    with untouched(trainer.model):
        try:
            forward_evaluating(trainer, batch, full_logits)
        except torch.cuda.OutOfMemoryError:
            fits = False
        else:
            fits = True
    if not fits:
        forget_failure(trainer.model)
    return fits


def forward_evaluating(trainer: Any, batch: Mapping[str, Any], full_logits: bool) -> float:
    """The loss of a batch, as the evaluation finds it; leaves the model in eval mode."""
    trainer.model.eval()
    inputs = trainer._prepare_inputs(dict(batch))
    with torch.no_grad(), trainer.accelerator.autocast():
        if full_logits:
            inputs.pop("loss_rows", None)
            outputs = trainer.model(**inputs, use_cache=False)
        else:
            outputs = trainer.fused_outputs(trainer.model, inputs, _num_items(batch))
    return outputs.loss.item()


def forward_backward(trainer: Any, batch: Mapping[str, Any]) -> float:
    """The loss of a batch, whose gradients are added to those that are there; leaves the model in training mode."""
    trainer.model.train()
    inputs = trainer._prepare_inputs(dict(batch))
    num_items = _num_items(batch)
    with checkpointed_as_in_training(trainer), trainer.maybe_activation_offload_context:
        with trainer.accelerator.autocast():
            if trainer.compute_loss_func is not None:
                labels = inputs.pop("labels")
                inputs.pop("loss_rows", None)
                outputs = trainer.model(**inputs, use_cache=False)
                loss = trainer.compute_loss_func(outputs, labels, num_items_in_batch=num_items)
            else:
                loss = trainer.fused_outputs(trainer.model, inputs, num_items).loss
        loss.backward()
    return loss.item()


def _num_items(batch: Mapping[str, Any]) -> int:
    return max(1, int((batch["labels"][..., 1:] != -100).sum()))


class _LayerClock:
    """Times the forward pass of a layer: the shortest of all but the first, which compiles. From the third on they may
    wait for copies to the host, which `layer_seconds` counts apart."""

    def __init__(self, model: nn.Module) -> None:
        layers = fused_layers(model)
        self.times = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in layers]
        self.handles = []
        for layer, (begin, end) in zip(layers, self.times, strict=True):
            self.handles.append(layer.register_forward_pre_hook(lambda *_, begin=begin: begin.record()))
            self.handles.append(layer.register_forward_hook(lambda *_, end=end: end.record()))

    def seconds(self) -> float | None:
        """None without a fused layer."""
        return min((begin.elapsed_time(end) / 1e3 for begin, end in self.times[1:] or self.times), default=None)

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def measured_host_rate(device: torch.device) -> float:
    """Bytes a second of a copy from the device to pinned memory."""
    data = torch.empty(HOST_COPY, dtype=torch.uint8, device=device)
    host = torch.empty(HOST_COPY, dtype=torch.uint8, pin_memory=True)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    host.copy_(data, non_blocking=True)
    begin.record()
    for _ in range(4):
        host.copy_(data, non_blocking=True)
    end.record()
    end.synchronize()
    return 4 * HOST_COPY / (begin.elapsed_time(end) / 1e3)
