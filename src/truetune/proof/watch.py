"""While it runs: what is not finite stops it, with the step's batches saved; spikes, a dead rate, a drift of throughput
and memory that climbs are named.

Everything is read where the trainer logs, so that no step waits for the device.
"""

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback

from truetune.proof.drift import Climb, Throughput, device_bytes, process_bytes
from truetune.proof.errors import ProofError

logger = logging.getLogger(__name__)
BATCH_FILE = "stopped_batch_{step}_{rank}.safetensors"
KEPT_BATCHES = 256  # micro-batches since the last log
KEPT_NAMES = ("input_ids", "labels", "position_ids", "attention_mask", "cu_seq_lens_q")
HISTORY, ENOUGH = 64, 16  # logged losses that a spike is judged by
SPIKE = 8.0  # times the usual deviation, and at least
SPIKE_SHARE = 0.2  # of the usual loss, and
ABOVE_ALL = 1.25  # times the largest: packs of one kind of task may be dearer every time
DEAD_LOGS = 5


class Watch(TrainerCallback):
    """Raises `ProofError` where a logged loss or gradient norm is not finite; warns of spikes, of a rate of zero, and
    of what `drift.py` sees."""

    def __init__(self) -> None:
        self.batches: deque[dict[str, Tensor]] = deque(maxlen=KEPT_BATCHES)
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.still = 0
        self.throughput = Throughput()
        self.memory = {"device memory": Climb("device memory"), "host memory": Climb("the process's memory")}
        self.logged: tuple[int, float, float] | None = None  # step, tokens and time of the last log
        self.notes: list[dict[str, Any]] = []

    def see(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """A micro-batch on its way into the model; it is referred to, and not copied. Returns what is kept of it."""
        self.batches.append({name: inputs[name] for name in KEPT_NAMES if torch.is_tensor(inputs.get(name))})
        return self.batches[-1]

    def on_train_begin(self, args, state, control, **kwargs):
        self._pause(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._pause(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._pause(state)

    def on_save(self, args, state, control, **kwargs):
        self._pause(state)

    def _pause(self, state) -> None:
        """Something else than training took its time. Right behind a log the clock begins anew; an interval with a
        pause in the middle is no measure, because the device may have trained on in it."""
        step, tokens, _ = self.logged or (-1, 0.0, 0.0)
        self.logged = (step, tokens, time.monotonic()) if step == state.global_step else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        # fp16's scaler tries scales that overflow, and skips those steps.
        loss, norm = logs["loss"], 0.0 if args.fp16 else logs.get("grad_norm", 0.0)
        # By default Transformers leaves a loss that is not finite out of its mean; entropy comes of the same logits.
        values = (("loss", loss), ("gradient norm", norm), ("entropy", logs.get("entropy", 0.0)))
        broken = [name for name, value in values if not math.isfinite(value)]
        if broken:
            raise ProofError(self._stopped(args, state, ", ".join(broken)))
        self.batches.clear()
        self._spike(state, float(loss))
        self._dead_rate(state, logs.get("learning_rate", 1.0))
        self._drift(args, state, logs)

    def _stopped(self, args, state, what: str) -> str:
        path = Path(args.output_dir) / BATCH_FILE.format(step=state.global_step, rank=args.process_index)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_batches(path, list(self.batches))
        return (
            f"the {what} of step {state.global_step} is not finite: lower the learning rate or mend the data; its "
            f"batches are in {path} (truetune inspect --batch shows them)."
        )

    def _spike(self, state, loss: float) -> None:
        if len(self.losses) >= ENOUGH:
            usual = statistics.median(self.losses)
            deviation = statistics.median(abs(value - usual) for value in self.losses)
            unusual = loss - usual > max(SPIKE * deviation, SPIKE_SHARE * usual)
            if unusual and loss > ABOVE_ALL * max(self.losses):
                self._note(state, "loss spike", f"{loss:.4g}, where {usual:.4g} was usual")
        self.losses.append(loss)

    def _dead_rate(self, state, rate: float) -> None:
        last = state.max_steps > 0 and state.global_step >= 0.95 * state.max_steps
        self.still = self.still + 1 if rate == 0 and not last else 0
        if self.still == DEAD_LOGS:
            self._note(state, "dead learning rate", f"0 in {DEAD_LOGS} logs, {state.max_steps} steps are planned")

    def _drift(self, args, state, logs: Mapping[str, Any]) -> None:
        tokens, now = float(logs.get("num_tokens", 0.0)), time.monotonic()
        if self.logged is not None:
            step, before, since = self.logged
            slow = self.throughput.see(tokens - before, state.global_step - step, now - since)
            if slow:
                self._note(state, "slower", slow)
        self.logged = state.global_step, tokens, now
        for kind, used in (("device memory", device_bytes(args.device)), ("host memory", process_bytes())):
            grown = self.memory[kind].see(used)
            if grown:
                self._note(state, f"{kind} grows", grown)

    def _note(self, state, kind: str, what: str) -> None:
        self.notes.append({"step": state.global_step, "kind": kind, "seen": what})
        if state.is_world_process_zero:
            logger.warning("step %s: %s: %s", state.global_step, kind, what)


def save_batches(path: Path, batches: list[dict[str, Tensor]]) -> None:
    tensors = {
        f"{number}.{name}": tensor.detach().cpu().contiguous().clone()
        for number, batch in enumerate(batches)
        for name, tensor in batch.items()
    }
    save_file(tensors, path)


def load_batches(path: str | Path) -> list[dict[str, Tensor]]:
    """What `save_batches` wrote. Raises `ProofError` for any other file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        batches: list[dict[str, Tensor]] = [{} for _ in {key.partition(".")[0] for key in tensors}]
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            batches[int(number)][name] = tensor
        if not all({"input_ids", "labels"} <= batch.keys() for batch in batches):
            raise KeyError
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ProofError(f"{path} holds no saved batches: name a stopped_batch file of a run.") from error
    return batches
