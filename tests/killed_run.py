"""`truetune train` in processes of its own, killed with SIGKILL at a phase or from outside, and compared to the bit.

The processes are forked from a server that has imported everything, so that a run begins in a tenth of a second.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from truetune import cli, demo, run
from truetune.train.checkpoints import last_checkpoint
from truetune.train.recipe_trainer import RecipeTrainer

ROWS = 40
MEASURED = (
    "seconds", "tokens_per_second", "memory_gib", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
)  # fmt: skip
# Dropout draws random numbers, sums are logged every third step, an epoch's last step is evaluated and saved.
RECIPE = {
    "model": demo.BUILTIN,
    "eval_data": "0.2",
    "max_length": "64",
    "training.num_train_epochs": "3",
    "training.per_device_train_batch_size": "2",
    "training.gradient_accumulation_steps": "2",
    "training.learning_rate": "3e-3",
    "training.logging_steps": "3",
    "training.eval_strategy": "epoch",
    "training.save_steps": "2",
}
if torch.cuda.is_available():  # there the fastest kernels sum in the order in which they come
    RECIPE["training.full_determinism"] = "true"
LORA = {"lora.r": "4", "lora.lora_dropout": "0.1"}

# What has been imported may have used CUDA, and no fork can after that.
_context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
PRELOADED = ["truetune.cli", "truetune.run", "truetune.data.files", "bitsandbytes"]
_context.set_forkserver_preload(PRELOADED)


def write_rows(path: Path) -> Path:
    """A part of the built-in conversations."""
    lines = Path(demo.resolve_data(demo.BUILTIN)).read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:ROWS]), encoding="utf-8")
    return path


class Run:
    """A run's command line and output directory."""

    def __init__(self, output: Path, data: Path, settings: dict[str, str]) -> None:
        self.output, self.data, self.settings = output, data, settings

    def but(self, settings: dict[str, str]) -> "Run":
        """The same run, going on otherwise."""
        return Run(self.output, self.data, {**self.settings, **settings})

    def start(self, *options: str, kill_at: tuple[str, int] | None = None):
        """A started process; with `kill_at`, (phase, step), it kills itself there."""
        recipe = {**RECIPE, "data": self.data, **self.settings, "output_dir": self.output}
        words = ["train", *(f"{key}={value}" for key, value in recipe.items()), *options]
        has_imported = _context.Event()
        process = _context.Process(target=_work, args=(words, str(self._log), kill_at, has_imported))
        process.has_imported = has_imported  # which has to outlive this call: the process opens it by name
        process.start()
        return process

    def finish(self, *options: str) -> float:
        """The seconds that it took, without those of the imports."""
        process = self.start(*options)
        _wait_for_imports(process)
        begun = time.monotonic()
        process.join()
        assert process.exitcode == 0, self.said
        return time.monotonic() - begun

    def killed(self, phase: str, step: int, *options: str) -> None:
        process = self.start(*options, kill_at=(phase, step))
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"not killed at {phase}: {self.said}"

    def killed_after(self, seconds: float, *options: str) -> bool:
        """Whether it had not ended by itself before. Imports, with CUDA most of a short run, are not counted."""
        process = self.start(*options)
        _wait_for_imports(process)
        process.join(seconds)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), self.said
        return process.exitcode != 0

    def how_to_go_on(self) -> list[str]:
        """--resume, but for a run that was killed before anything was written."""
        return ["--resume"] if (self.output / "run.json").exists() else ["--overwrite"]

    @property
    def _log(self) -> Path:
        return self.output.with_suffix(".log")

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def record(self) -> dict:
        return json.loads((self.output / "run.json").read_text(encoding="utf-8"))

    def metrics(self) -> list[dict]:
        """Every line, all but what is timed."""
        lines = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def _wait_for_imports(process) -> None:
    while not process.has_imported.wait(1):
        assert process.is_alive(), f"ended with {process.exitcode} while it imported"


def assert_same_to_the_bit(resumed: Run, whole: Run) -> None:
    """Losses and all that is logged, weights, optimizer state, and which checkpoints are left."""
    assert resumed.record["status"] == "finished"
    assert resumed.metrics() == whole.metrics()
    name = "adapter_model.safetensors" if (whole.output / "adapter_model.safetensors").exists() else "model.safetensors"
    expected, found = (load_file(each.output / name) for each in (whole, resumed))
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]
    checkpoint, other = last_checkpoint(whole.output), last_checkpoint(resumed.output)
    assert checkpoint is not None and other is not None and checkpoint.name == other.name
    states = [torch.load(place / "optimizer.pt", weights_only=True) for place in (checkpoint, other)]
    assert _same(*states)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


# -- in the process that is killed -------------------------------------------------------------------------------------


def _work(words: list[str], log: str, kill_at: tuple[str, int] | None, has_imported: Any) -> None:
    os.setpgrp()  # processes that it starts to collate end with it: their own parent is a server that lives on
    for module in PRELOADED:  # a spawned process has imported only what this file does
        importlib.import_module(module)
    has_imported.set()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["truetune", *words]
    if kill_at is not None:
        phase, step = kill_at
        PHASES[phase](step)
    cli.main(words)


def _die() -> NoReturn:
    os.killpg(0, signal.SIGKILL)
    while True:  # until the signal has come
        time.sleep(1)


def _cut_and_die(path: Path) -> NoReturn:
    """What a kill in the middle of writing leaves."""
    assert path.stat().st_size > 1
    os.truncate(path, path.stat().st_size // 2)
    _die()


def _loading(step: int) -> None:
    make_trainer = run.make_trainer

    def make_and_die(*arguments):
        make_trainer(*arguments)
        _die()

    run.make_trainer = make_and_die


def _on_event(event: str) -> Callable[[int], None]:
    def arrange(step: int) -> None:
        def die(self, args, state, control, **kwargs) -> None:
            if state.global_step >= step:
                _die()

        class Killer(TrainerCallback):
            pass

        setattr(Killer, event, die)
        make_trainer = run.make_trainer

        def make_with_killer(*arguments):
            trainer = make_trainer(*arguments)
            trainer.add_callback(Killer())
            return trainer

        run.make_trainer = make_with_killer

    return arrange


def _while_saving(method: str, file: str) -> Callable[[int], None]:
    def arrange(step: int) -> None:
        save = getattr(RecipeTrainer, method)

        def save_and_die(self, output_dir, *arguments, **keywords):
            save(self, output_dir, *arguments, **keywords)
            if self.state.global_step >= step:
                _cut_and_die(Path(output_dir) / file)

        setattr(RecipeTrainer, method, save_and_die)

    return arrange


def _while_saving_the_state(step: int) -> None:
    save = TrainerState.save_to_json

    def save_and_die(self, path):
        save(self, path)
        if self.global_step >= step:
            _cut_and_die(Path(path))

    TrainerState.save_to_json = save_and_die


def _on_audit(of_interest: Callable[[str, tuple], bool], count: int) -> Callable[[int], None]:
    """Dies just before the `count`-th such thing that Python is about to do."""

    def arrange(step: int) -> None:
        seen = 0

        def hook(event: str, arguments: tuple) -> None:
            nonlocal seen
            if of_interest(event, arguments):
                seen += 1
                if seen == count:
                    _die()

        sys.addaudithook(hook)

    return arrange


def _removes_from_a_checkpoint(event: str, arguments: tuple) -> bool:
    # The files of a directory that is removed are named without it.
    return event == "os.remove" and os.path.basename(str(arguments[0])) in _FILES_OF_A_CHECKPOINT


def _moves_the_tokenizer(event: str, arguments: tuple) -> bool:
    return event == "os.rename" and ".saving" in str(arguments[0]) and str(arguments[1]).endswith("tokenizer.json")


_FILES_OF_A_CHECKPOINT = (
    "adapter_model.safetensors",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "files.json",
)
PHASES: dict[str, Callable[[int], None]] = {
    "loading": _loading,
    "between micro-batches": _on_event("on_substep_end"),
    "optimizer step": _on_event("on_optimizer_step"),
    "evaluation": _on_event("on_prediction_step"),
    "saving the model": _while_saving("save_model", "training_args.bin"),
    "saving the optimizer": _while_saving("_save_optimizer_and_scheduler", "optimizer.pt"),
    "saving the trainer's state": _while_saving_the_state,
    "removing an old checkpoint": _on_audit(_removes_from_a_checkpoint, count=2),
    "putting the result in place": _on_audit(_moves_the_tokenizer, count=1),
}
