"""The output directory: whether a run may have it, the checkpoint to go on from, and how results get into it.

Every file is written beside its place and renamed into it.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from truetune.recipe import Recipe
from truetune.run_record import read_record
from truetune.train.checkpoints import checkpoint_step, checkpoints, last_checkpoint
from truetune.train.errors import TrainError
from truetune.train.recipe_trainer import RecipeTrainer

# What a run writes, so that --overwrite takes no file away that is not a run's.
_WRITTEN = (
    "adapter_config.json",
    "adapter_model*",
    "model*.safetensors*",
    "config.json",
    "generation_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "recipe.yaml",
    "run.json",
    "metrics.jsonl",
    "activation_plan.json",
    "proof.json",
    "README.md",
)
SAVING = ".saving"
_NOT_KEPT = ("README.md", "training_args.bin")  # an empty model card, and a pickle


def check_output(path: Path, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from, where asked for; None: from the start.

    A run that was killed before its first checkpoint goes on from the start. Raises `TrainError` where the directory
    cannot be had so.
    """
    if resume and overwrite:
        raise TrainError("--resume keeps what --overwrite replaces: give one of them.")
    _refuse_ways_out(path)
    holds_files = path.is_dir() and any(path.iterdir())
    if resume:
        checkpoint = last_checkpoint(path)
        if checkpoint is None and (read_record(path) or {}).get("status") not in ("running", "interrupted"):
            again = "start anew with --overwrite" if holds_files else "start without --resume"
            raise TrainError(f"{path} has no complete checkpoint to go on from: {again}.")
        return checkpoint
    if holds_files and not overwrite:
        raise TrainError(
            f"{path} is not empty: go on there with --resume, replace it with --overwrite, or choose another output."
        )
    return None


def _refuse_ways_out(output: Path) -> None:
    """A link that somebody left in the directory would have checkpoints or results written to where it leads."""
    inside = output.resolve()
    for directory, subdirectories, files in os.walk(output):
        for path in (Path(directory, name) for name in (*subdirectories, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise TrainError(
                    f"{path} is a link that leads out of the output directory, to {os.readlink(path)}: remove it, or "
                    "choose another output."
                )


@contextmanager
def no_empty_directory(path: Path) -> Iterator[None]:
    """Where what is inside fails, the empty directory that a trainer makes goes again."""
    existed = path.exists()
    try:
        yield
    except BaseException:
        if not existed and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        raise


def begin_output(path: Path, recipe: Recipe, *, resume: bool) -> None:
    """Makes the directory ready: without `resume` an earlier run's files go, with it only checkpoints cut short."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(path / SAVING, ignore_errors=True)
    for checkpoint in checkpoints(path):
        if not resume or checkpoint_step(checkpoint) is None:
            shutil.rmtree(checkpoint)
    if not resume:
        for file in {file for pattern in _WRITTEN for file in path.glob(pattern) if file.is_file()}:
            file.unlink()
    beside = path / ".recipe.yaml.new"
    beside.write_text(recipe.to_yaml(), encoding="utf-8")
    os.replace(beside, path / "recipe.yaml")


def save_result(trainer: RecipeTrainer, path: Path) -> None:
    """Puts the adapter or the model, and the tokenizer with its template, into `path`. Every process calls it."""
    beside = path / SAVING
    trainer.save_model(str(beside))
    if not trainer.args.should_save:
        return
    for file in sorted(beside.iterdir()):
        if file.name not in _NOT_KEPT:
            os.replace(file, path / file.name)
    shutil.rmtree(beside)


_USE = """\
from {module} import {loader}
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({path!r})
model = {loader}.from_pretrained({path!r}, dtype="auto")
prompt = {prompt}
output = model.generate(**prompt, max_new_tokens=200, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :]))"""
_CHAT_PROMPT = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "..."}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""


def print_next(console: Console, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, interrupted: bool) -> None:
    """Where everything is, and what to run next."""
    path = Path(recipe.output_dir)
    if interrupted:
        words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
        stopped = f"Stopped, with a checkpoint in {last_checkpoint(path)}. Go on with\n"
        console.print(stopped, highlight=False, markup=False)
        console.print(shlex.join(["truetune", *words, "--resume"]), soft_wrap=True, highlight=False, markup=False)
        return
    is_adapter = recipe.method != "full"
    use = _USE.format(
        module="peft" if is_adapter else "transformers",
        loader="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        path=str(path),
        prompt=_CHAT_PROMPT if tokenizer.chat_template else 'tokenizer("...", return_tensors="pt")',
    )
    what = "The adapter" if is_adapter else "The model"
    console.print(
        f"{what} and its tokenizer are in {path}, with recipe.yaml, metrics.jsonl and run.json. Use it with\n",
        markup=False,
    )
    console.print(use, soft_wrap=True, highlight=False, markup=False)
