"""What a run does between the trainer's steps: progress, metrics.jsonl, and a stop that loses nothing."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from truetune.run_record import MetricsFile


class WriteMetrics(TrainerCallback):
    """One line of metrics.jsonl a log: TRL's names, and which kind of log, which step, seconds and tokens/s."""

    def __init__(self, file: MetricsFile, begin: Callable[[], None], before: Sequence[dict[str, Any]] = ()) -> None:
        self.file = file
        self.begin = begin  # called once, by the process that writes
        self.last = {line["kind"]: line for line in before}  # of each kind; `before`: what a resumed run goes on from
        self._begun = self._logged_at = time.monotonic()
        self._num_tokens = 0.0
        self._before: Mapping[str, Any] = self.last.get("train", {})

    def last_step(self, kind: str) -> int | None:
        return self.last.get(kind, {}).get("step")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.begin()
        self._begun = self._logged_at = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self._logged_at = time.monotonic()  # a checkpoint takes nothing from tokens/s

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "train_runtime" in logs:  # the sum of the run, which is run.json's
            return
        kind = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        now = time.monotonic()
        line = {"kind": kind, "step": state.global_step, **logs}
        line["seconds"] = round(self._before.get("seconds", 0.0) + now - self._begun, 3)
        if kind == "train":
            tokens = logs.get("num_tokens", 0.0) - self._num_tokens
            line["tokens_per_second"] = round(tokens / max(now - self._logged_at, 1e-9), 1)
            self._num_tokens += tokens
        for name in ("num_tokens", "eval_num_tokens"):
            if name in line:
                line[name] += self._before.get("num_tokens", 0.0)  # the trainer counts from its own start
        self._logged_at = time.monotonic()
        self.last[kind] = line
        if state.is_world_process_zero:
            self.file.append(line)


class SaveWhatIsLogged(TrainerCallback):
    """A checkpoint comes after the log and the evaluations of its step; called after all that may ask for one.

    Sums since the last log are in no checkpoint: a resumed run would log other losses than the run that was not killed.
    And an evaluation at the end of an epoch, after the checkpoint of its last step, would never be made up for.
    """

    def __init__(self) -> None:
        self._at_epoch_end = False

    def on_step_end(self, args, state, control, **kwargs):
        self._at_epoch_end = control.should_save and float(state.epoch).is_integer()
        if self._at_epoch_end:
            control.should_save = False
        elif control.should_save or (args.save_strategy == "best" and control.should_evaluate):
            control.should_log = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._at_epoch_end:
            control.should_save = True
        if control.should_save or (args.save_strategy == "best" and control.should_evaluate):
            control.should_log = True
        self._at_epoch_end = False


class ShowProgress(TrainerCallback):
    """A bar with loss, learning rate, tokens/s and the time left; without a terminal, about twenty lines a run."""

    def __init__(self, console: Console, metrics: WriteMetrics) -> None:
        self.console = console
        self.metrics = metrics  # called before this one
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step, numbers="")
        self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "train_runtime" in logs:
            return
        if "eval_loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}  eval loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            line = self.metrics.last["train"]
            numbers = (
                f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
            )
            self.bar.update(self.task, numbers=numbers)
            every = max(1, state.max_steps // 20)
            if not self.console.is_terminal and (state.global_step % every == 0 or state.global_step <= 1):
                self.console.print(f"step {state.global_step}/{state.max_steps}  {numbers}")

    @contextmanager
    def shown(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.bar.stop()


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C finishes the step, saves a checkpoint and ends the training; a second one kills."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.asked = False  # on this rank
        self.stopped = False  # on all

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, signum, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.console.print("Stopping after this step, with a checkpoint; Ctrl-C again stops at once without one.")

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_rank_asked(args.device):
            self.stopped = True
            control.should_training_stop = True
            control.should_save = True

    def _any_rank_asked(self, device: torch.device) -> bool:
        # The signal reaches the ranks in different steps; all must stop after the same one.
        if not torch.distributed.is_initialized():
            return self.asked
        asked = torch.tensor(int(self.asked), device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked)
