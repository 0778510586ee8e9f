"""The commands. No logic: each reads its options, and imports what it needs when it runs, so that --help is quick."""

import gc
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from truetune import __version__
from truetune.importing import uncollected
from truetune.readahead import read_ahead

app = typer.Typer(
    name="truetune",
    help="Fine-tune a language model on your own conversations.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help through Rich takes twice as long
    context_settings={"help_option_names": ["-h", "--help"]},
)

Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE.yaml KEY=VALUE",
        help="A recipe, and keys that change it, such as max_length=4096 lora.r=32 training.learning_rate=1e-4.",
        show_default=False,
    ),
]
Model = Annotated[str | None, typer.Option(help="Hub name, directory, or builtin:demo.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="File, directory, glob, Hub name, or builtin:demo.", show_default=False)]
Method = Annotated[str | None, typer.Option(help="lora (default), qlora or full.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_LONGEST_MESSAGE = 1000
INTERRUPTED = 130  # the shell's code for SIGINT
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Click's, which some versions of Typer carry themselves
OVERWRITE = "Replace what the output directory holds."


def _print_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def train(
    changes: Changes = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    output: Annotated[str | None, typer.Option(help="Where the result goes.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop before training.")] = False,
    num_processes: Annotated[int | None, typer.Option(help="Processes, one a GPU.", show_default="one a GPU")] = None,
) -> None:
    """Fine-tune a model by a recipe, options, or both."""
    recipe = _recipe(changes, weights=not dry_run, model=model, data=data, method=method, output_dir=output)
    result = _run().train(recipe, dry_run=dry_run, resume=resume, overwrite=overwrite, num_processes=num_processes)
    raise typer.Exit(result.exit_code)


@app.command()
def inspect(
    changes: Changes = None,
    model: Model = None,
    data: Data = None,
    rows: Annotated[int | None, typer.Option(min=0, help="Rows to show.", show_default="3, with --json all")] = None,
    batch: Annotated[Path | None, typer.Option(help="Show the batches that a run saved when it stopped.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the data as it will be trained.

    Which tokens are supervised, what is cut or dropped, how full the packs are. Needs tokenizer files alone.
    """
    recipe = _recipe(changes, model=model, data=data)
    from rich.console import Console

    from truetune.data import audit
    from truetune.run_data import prepare_shown
    from truetune.run_model import load_tokenizer

    tokenizer, _ = load_tokenizer(recipe)
    if batch is not None:
        from truetune.run_data import saved_documents

        for number, document in saved_documents(batch):
            if as_json:
                print(json.dumps({"batch": number, **document}))
            else:
                Console(highlight=False).print(audit.render_document(tokenizer, document))
        return
    prepared = prepare_shown(recipe, tokenizer, Console(stderr=True))
    packing = recipe.max_length if recipe.packing else None
    if as_json:
        for line in audit.inspect_lines(prepared, tokenizer, rows=rows, packing=packing):
            print(json.dumps(line))
        return
    console = Console(highlight=False)
    for document in audit.shown(prepared, 3 if rows is None else rows):
        console.rule(f"row {document['row']}", align="left")
        console.print(audit.render_document(tokenizer, document))
    console.rule()
    console.print(audit.render_summary(audit.summary(prepared, packing)))


@app.command()
def check(
    changes: Changes = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    as_json: AsJson = False,
) -> None:
    """Run the checks that training begins with, without training.

    Exits with 1 where one fails.
    """
    recipe = _recipe(changes, weights=True, model=model, data=data, method=method)
    from rich.console import Console

    proof = _run().check(recipe, Console(stderr=True))
    if as_json:
        print(json.dumps(proof.to_dict(), indent=1, default=str))
    raise typer.Exit(1 if proof.failures else 0)


@app.command()
def plan(
    changes: Changes = None,
    model: Model = None,
    data: Data = None,
    method: Method = None,
    memory: Annotated[
        float | None, typer.Option(min=1, help="Memory of the GPU in GiB.", show_default="of the GPU here")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a step needs of the GPU's memory, and whether it fits.

    What each layer keeps, recomputes or puts on the host, and an estimate of tokens/s. Needs config.json alone; exits
    with 1 where it does not fit.
    """
    recipe = _recipe(changes, model=model, data=data, method=method)
    from rich.console import Console

    from truetune.run import training_arguments
    from truetune.run_plan import plan_recipe, print_recipe_plan

    found = plan_recipe(recipe, training_arguments(recipe), memory)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print_recipe_plan(found, Console(highlight=False))
    raise typer.Exit(0 if found.fits else 1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has and what is in effect on it."""
    _quiet_libraries()
    from truetune import doctor

    found = doctor.gather()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        doctor.render(found)


@app.command()
def init(path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml")) -> None:
    """Write a recipe that explains every key."""
    from truetune.recipe import write_template

    write_template(path)
    print(f"Wrote {path}: set model and data, then truetune train {path}")


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Where the result goes.")] = "runs/demo",
) -> None:
    """Do the whole job on the built-in model and data."""
    _quiet_libraries()
    from truetune.run_demo import run_demo

    run_demo(output)


@app.command("run", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run_script(
    script: Annotated[
        list[str], typer.Argument(metavar="SCRIPT.py|-m MODULE [ARGS]...", help="Passed on as they are.")
    ],
) -> None:
    """Run a TRL script with truetune's SFTTrainer and SFTConfig."""
    from truetune.train import patch

    patch.run_script(script)


def _recipe(changes: list[str] | None, weights: bool = False, **flags: str | None) -> Any:
    """A positional argument is the recipe where it is a file or has no "="; all others are KEY=VALUE. `weights`: they
    will be loaded."""
    from truetune.recipe import load_recipe

    _quiet_libraries()
    overrides = list(changes or [])
    path = None
    if overrides and ("=" not in overrides[0] or os.path.isfile(overrides[0])):
        path = overrides.pop(0)
    with uncollected():
        return load_recipe(path, overrides, flags, read_ahead if weights else None)


def _run() -> Any:
    """`truetune.run`, with the libraries that it needs. What they made is not looked through for garbage: `main` thaws
    it."""
    with uncollected():
        from truetune import run
    gc.freeze()
    return run


def _quiet_libraries() -> None:
    """Hides what is not the user's to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|accelerate")
    # On CPUs with AVX512-BF16 it asks at import for a kernel of inference that `keep_4bit_layout` keeps from running.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


# -- errors ------------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits: 0, 2 for a user's mistake (one sentence on stderr), 130 for Ctrl-C."""
    # Before the libraries are imported that read them: no reports, no counting of downloads, and no asking the Hub's
    # converter for weights that a model does not have.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    command = typer.main.get_command(app)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = command.main(args=words or ["--help"], prog_name="truetune", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _say("stopped.")
        code = INTERRUPTED
    except _UsageError as error:
        _say(_usage(error))
        code = 2
    except ValueError as error:
        if not isinstance(error, _mistakes()):
            raise
        _say(str(error))
        code = 2
    finally:
        gc.unfreeze()  # libraries complain at the end of what is left
    sys.exit(code if isinstance(code, int) else 0)


def _mistakes() -> tuple[type[ValueError], ...]:
    from truetune.data.errors import DataError
    from truetune.models.errors import ModelError
    from truetune.proof.errors import ProofError
    from truetune.recipe import RecipeError
    from truetune.train.errors import TrainError

    return DataError, ModelError, TrainError, RecipeError, ProofError


def _say(message: str) -> None:
    print(f"truetune: {_one_sentence(message)}", file=sys.stderr)


def _one_sentence(message: str) -> str:
    """A message as one line; where it quotes another library's sentences, semicolons join them.

    What it quotes from data, recipes and templates can be long, or steer a terminal.
    """
    message = re.sub(r"[.!?] (?=[A-Z])", "; ", " ".join(message.split()))
    if len(message) > _LONGEST_MESSAGE:
        half = _LONGEST_MESSAGE // 2
        message = f"{message[:half]} ... {message[-half:]}"
    message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    return message if message.endswith((".", "?")) else f"{message}."


def _usage(error: Any) -> str:
    """What was wrong with the options, in one sentence; and how a recipe's key is written that came as one."""
    option = getattr(error, "option_name", None)
    if option is None or not hasattr(error, "possibilities"):
        return error.format_message().replace(". Did you mean", ": did you mean")
    from truetune.recipe_schema import how_to_set, is_known

    key = option.lstrip("-").replace("-", "_")
    if error.possibilities and not is_known(key):
        return f"There is no option {option}: did you mean {' or '.join(error.possibilities)}?"
    return f"There is no option {option}: {how_to_set(key)}"
