"""The story of a run, from a recipe to a directory with an adapter or a model in it.

What lies in that directory is described in docs/output.md. Until training begins nothing is written there, so that a
user's mistake leaves nothing half done.
"""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerState, get_scheduler, set_seed
from transformers.utils import is_liger_kernel_available

from truetune.data.prepare import Prepared
from truetune.data.stream import DocumentStream
from truetune.launch import INTERRUPTED, launch, processes_to_start
from truetune.models.load import check_model, load_model
from truetune.proof.result import Proof
from truetune.recipe import Recipe, with_batch_split
from truetune.run_callbacks import SaveWhatIsLogged, ShowProgress, StopOnInterrupt, WriteMetrics
from truetune.run_data import Plan, make_plan, prepare_data, print_counts, print_plan
from truetune.run_model import (
    add_lora,
    check_adapter,
    check_architecture,
    fit_embeddings,
    hub_arguments,
    load_adapter,
    load_tokenizer,
    model_path,
    model_precision,
    with_adapter,
    without_weights,
)
from truetune.run_output import begin_output, check_output, no_empty_directory, print_next, save_result
from truetune.run_plan import print_whether_it_fits
from truetune.run_proven import proven_before
from truetune.run_record import MetricsFile, as_written, finished, new_record, read_record, with_model, write_json
from truetune.run_resume import check_same_run
from truetune.train.activations import asked_policy
from truetune.train.checkpoints import checkpoint_step
from truetune.train.config import SFTConfig
from truetune.train.errors import TrainError
from truetune.train.recipe_trainer import RecipeTrainer


@dataclass
class RunResult:
    """`plan` is None where other processes did the work; `trainer` is None there and after a dry run."""

    output_dir: Path
    plan: Plan | None = None
    trainer: RecipeTrainer | None = None
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.interrupted else 0


def train(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    num_processes: int | None = None,
    console: Console | None = None,
) -> RunResult:
    """Trains what `recipe` says and leaves it in `recipe.output_dir`.

    dry_run: check and count all that needs no weights, and stop
    resume: go on from the last checkpoint in the output directory, or from the start where none was reached
    overwrite: a run that lies in the output directory may be replaced
    num_processes: by default one a GPU; to start them, this program is run again once for each

    The first Ctrl-C ends the training after its step, with a checkpoint. Raises `DataError`, `ModelError` or
    `TrainError` for what the user can mend, and `SystemExit` with the code of a started process that failed.
    """
    output = Path(recipe.output_dir)
    checkpoint = check_output(output, resume=resume, overwrite=overwrite)
    count = None if dry_run else processes_to_start(num_processes, torch.cuda.device_count())
    if count is not None:
        code = launch(count, on_gpus=torch.cuda.is_available())
        if code not in (0, INTERRUPTED):
            raise SystemExit(code)  # the process that failed has said why
        return RunResult(output, interrupted=code == INTERRUPTED)

    args = training_arguments(recipe)
    if not args.should_save:  # the first process speaks for all
        console = Console(quiet=True)
    console = console or Console()
    check_configuration(recipe, args, console)
    tokenizer, new_ids = load_tokenizer(recipe)
    with args.main_process_first(desc="preparing data"):  # the others find it in the cache
        data, eval_data = prepare_data(recipe, tokenizer, args.seed, console)
    plan = make_plan(recipe, data, args)
    print_plan(console, recipe, data, plan)
    if dry_run:
        return RunResult(output, plan)

    record = new_record(recipe, args, tokenizer, plan.to_dict(), data, eval_data)
    before = read_record(output) if resume else None
    if before is not None:
        check_same_run(output, before, as_written(record), recipe.allow)
    with no_empty_directory(output):
        trainer = make_trainer(recipe, args, tokenizer, new_ids, data, eval_data)
        record = with_model(record, recipe, trainer)
        if before is not None:
            check_same_run(output, before, as_written(record), recipe.allow)
            resumed_from = [*before["resumed_from"], 0 if checkpoint is None else checkpoint_step(checkpoint)]
            record |= {"started": before["started"], "resumed_from": resumed_from}
        trainer.proving.proven = proven_before(recipe, record)
        interrupted = _fit(trainer, recipe, record, data, checkpoint, console)
    if isinstance(data, DocumentStream):
        console.print("Read from the stream, what is trained and what still lay in the buffer:")
        print_counts(console, data.counts)
    if args.should_save:
        print_next(console, recipe, tokenizer, interrupted)
    return RunResult(output, plan, trainer, interrupted)


def check(recipe: Recipe, console: Console) -> Proof:
    """The checks that `train` begins with, on the recipe's own weights and data; nothing is left but the data's cache.

    Raises what `train` raises, but for failed checks, which the result holds.
    """
    level = "full" if recipe.preflight == "off" else recipe.preflight
    with tempfile.TemporaryDirectory() as directory:
        recipe = replace(recipe, output_dir=directory, preflight=level)
        args = training_arguments(recipe)
        check_configuration(recipe, args)
        tokenizer, new_ids = load_tokenizer(recipe)
        data, eval_data = prepare_data(recipe, tokenizer, args.seed, console)
        trainer = make_trainer(recipe, args, tokenizer, new_ids, data, eval_data)
        if args.rehearse and args.device.type == "cuda":
            trainer.rehearse()
        return trainer.preflight()


def check_configuration(recipe: Recipe, args: SFTConfig, console: Console | None = None) -> None:
    """Refuses what the model's configuration and the adapter decide, and says on `console` whether a step fits a GPU.

    Raises `ModelError` and `TrainError`.
    """
    asked_policy(args)
    config = check_model(model_path(recipe), precision=model_precision(recipe), **hub_arguments(recipe))
    model = without_weights(config, recipe)
    check_architecture(model, recipe, args)
    check_adapter(recipe)
    model = with_adapter(model, recipe)
    if console is not None and torch.cuda.is_available():
        print_whether_it_fits(model, recipe, args, console)


def training_arguments(recipe: Recipe) -> SFTConfig:
    """The recipe's `training`, what the recipe says elsewhere, and what this machine decides.

    On a GPU, and with bf16 weights, bf16 autocast (fp16 with fp16 weights) unless `training.bf16` says otherwise: what
    is trained is in fp32. Raises `TrainError` for what TRL refuses.
    """
    on_gpu = torch.cuda.is_available()
    training = with_batch_split(recipe, int(os.environ.get("WORLD_SIZE", 1))).training
    fp16 = training.get("fp16", on_gpu and recipe.precision == "fp16")
    bf16 = not fp16 and (on_gpu or recipe.precision == "bf16")
    machine = {"fp16": fp16, "bf16": bf16, "use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu}
    display = {"disable_tqdm": True, "logging_nan_inf_filter": False}  # a loss of NaN is shown as one
    own = {"output_dir": recipe.output_dir, "max_length": recipe.max_length, "allow": list(recipe.allow)}
    own["preflight"] = recipe.preflight
    try:
        args = SFTConfig(**{**machine, **display, **training, **own})
        # A schedule says only here, with an optimizer of nothing, that it lacks one of its lr_scheduler_kwargs.
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)]),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]  # a mapping by now
        )
    except (TypeError, ValueError, ImportError) as error:
        raise _refused(error) from error
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise TrainError("training.use_liger_kernel needs a package that is not installed: pip install liger-kernel.")
    if args.activation_offloading and not on_gpu:
        raise TrainError("training.activation_offloading moves activations off a GPU, and there is none: remove it.")
    return args


def _refused(error: Exception) -> TrainError:
    return TrainError(f"the recipe's training is refused: {' '.join(str(error).split())}")


def make_trainer(
    recipe: Recipe,
    args: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    new_ids: list[int],
    data: Prepared | DocumentStream,
    eval_data: Prepared | None,
) -> RecipeTrainer:
    """Weights at the recipe's precision, with its adapter, in a trainer. Raises `ModelError` and `TrainError`."""
    set_seed(args.seed)  # before LoRA's A matrices are drawn
    init_arguments = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    model: Any = load_model(
        model_path(recipe), precision=model_precision(recipe), **hub_arguments(recipe), **init_arguments
    )
    fit_embeddings(model, len(tokenizer), new_ids)
    if recipe.adapter is not None:
        model = load_adapter(model, recipe.adapter)
    elif recipe.method != "full":
        model = add_lora(model, recipe, new_ids)
    try:
        trainer = RecipeTrainer(
            model,
            args,
            train_dataset=data.documents,
            eval_dataset=None if eval_data is None else eval_data.documents,
            processing_class=tokenizer,
            pack=recipe.packing,
            counts={**data.counts.to_dict(), "supervise": recipe.supervise},
            sources=list(data.shapes),
            eval_sources=[] if eval_data is None else list(eval_data.shapes),
        )
    except (TrainError, torch.OutOfMemoryError):
        raise
    except (ValueError, ImportError, RuntimeError, OSError) as error:  # report_to=wandb without wandb, a Hub offline
        raise _refused(error) from error
    try:
        trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    except (ValueError, ImportError, RuntimeError) as error:
        name = getattr(args.optim, "value", args.optim)
        raise TrainError(f"training.optim {name} cannot be had: {' '.join(str(error).split())}") from error
    return trainer


def _fit(
    trainer: RecipeTrainer,
    recipe: Recipe,
    record: dict[str, Any],
    data: Prepared | DocumentStream,
    checkpoint: Path | None,
    console: Console,
) -> bool:
    """From the first step to the saved result, or to a checkpoint where interrupted, which it returns."""
    output = Path(recipe.output_dir)
    file = MetricsFile(output / "metrics.jsonl")
    step = 0 if checkpoint is None else record["resumed_from"][-1]
    lines = file.lines_up_to(step)

    def begin() -> None:  # called when nothing can be refused any more
        begin_output(output, recipe, resume=checkpoint is not None)
        write_json(output / "run.json", {**record, "report": trainer.report.to_dict()})
        file.begin(lines)

    metrics = WriteMetrics(file, begin, lines)
    progress = ShowProgress(console, metrics)
    stop = StopOnInterrupt(console)
    trainer.remove_callback(PrinterCallback)
    for callback in (metrics, progress, stop, SaveWhatIsLogged()):
        trainer.add_callback(callback)

    if checkpoint is not None:
        console.print(f"Going on from {checkpoint}", markup=False)
        trainer.args.eval_on_start = False  # it was done
    elif record["resumed_from"]:
        console.print("Going on from the start: no checkpoint had been reached")
    train_metrics: dict[str, float] = {}
    if checkpoint is not None and step >= record["plan"]["steps"]:
        # It was stopped between its last step and its end; the trainer would take a step more.
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(checkpoint))
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        if trainer.args.should_save:
            begin()
    else:
        with stop.listening(), progress.shown():
            trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        train_metrics = trained.metrics
    interrupted = stop.stopped and trainer.state.global_step < trainer.state.max_steps
    if not interrupted:
        if trainer.eval_dataset is not None and metrics.last_step("eval") != trainer.state.global_step:
            trainer.evaluate()
        save_result(trainer, output)
    if trainer.args.should_save:
        done = finished(record, trainer, data.counts, train_metrics, metrics.last, interrupted)
        write_json(output / "run.json", done)
    return interrupted
