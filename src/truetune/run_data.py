"""A recipe's data made ready to train: read, split, prepared, counted."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status
from transformers import PreTrainedTokenizerBase

from truetune import demo
from truetune.data.chat import COUNTS
from truetune.data.errors import DataError
from truetune.data.packing import PackSampler
from truetune.data.prepare import Counts, Prepared, prepare
from truetune.data.rows import Row, RowSet, Source, read_rows, stream_rows
from truetune.data.stream import BUFFER, DocumentStream
from truetune.proof.excerpt import documents_of
from truetune.proof.watch import load_batches
from truetune.recipe import Recipe
from truetune.train.config import SFTConfig

FEW_STEPS = 50


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, console: Console
) -> tuple[Prepared | DocumentStream, Prepared | None]:
    """Documents to train on and, where the recipe asks for it, documents to evaluate on. Raises `DataError`."""
    sources = _resolved(recipe.data)
    with console.status("Reading data") as status:
        rows = None if recipe.streaming else read_rows(sources, seed=seed)
        eval_rows = None
        if rows is not None and isinstance(recipe.eval_data, float):
            rows, eval_rows = split_rows(rows, recipe.eval_data, seed)
        elif isinstance(recipe.eval_data, list):
            eval_rows = read_rows(_resolved(recipe.eval_data), seed=seed)
        eval_data = None if eval_rows is None else _prepared(recipe, tokenizer, eval_rows, status)
        if rows is None:
            return DocumentStream(sources, tokenizer, **_settings(recipe)), eval_data
        return _prepared(recipe, tokenizer, rows, status), eval_data


def prepare_shown(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> Prepared:
    """The documents to train on, to look at; of a stream, those of its first rows. Raises `DataError`."""
    if not recipe.streaming:
        data, _ = prepare_data(recipe, tokenizer, recipe.training["seed"], console)
        assert isinstance(data, Prepared)
        return data
    rows = stream_rows(_resolved(recipe.data)).first(BUFFER)
    console.print(f"The first {len(rows.rows):,} rows of a stream:")
    with console.status("Preparing data") as status:
        return _prepared(recipe, tokenizer, rows, status)


def saved_documents(path: Path) -> Iterator[tuple[int, dict[str, list[int]]]]:
    """(number of the micro-batch, document) of the batches that a stopped run saved. Raises `ProofError`."""
    for number, batch in enumerate(load_batches(path)):
        for document in documents_of(batch):
            yield number, document


def _prepared(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: RowSet, status: Status) -> Prepared:
    def show(done: int, of: int) -> None:
        status.update(f"Preparing data: {done:,} of {of:,} rows")

    return prepare(recipe.data, tokenizer, **_settings(recipe), rows=rows, progress=show)


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {"supervise": recipe.supervise, "max_length": recipe.max_length, "overflow": recipe.overflow}


def _resolved(sources: Sequence[Source]) -> list[Source]:
    """The built-in data as the file that it is made into, everything else as it is."""
    return [
        replace(source, path=demo.resolve_data(source.path, source.split), split="train")
        if source.path == demo.BUILTIN
        else source
        for source in sources
    ]


def split_rows(rows: RowSet, share: float, seed: int) -> tuple[RowSet, RowSet]:
    """(rows to train on, rows to evaluate on): `share` of the distinct conversations, drawn by `seed`.

    Rows with the same text go to the same side. Raises `DataError` where a side would be empty.
    """
    key_of_row = [_content(row) for row in rows.rows]
    keys = list(dict.fromkeys(key_of_row))
    count = max(1, round(share * len(keys)))
    if count >= len(keys):
        raise DataError(
            f"eval_data {share:g} leaves nothing to train on: of {len(keys)} different conversation(s), {count} would "
            "be held out; give more data, or evaluation data of its own"
        )
    held_out = set(random.Random(f"{seed}/eval").sample(keys, count))
    sides = []
    for name, is_held_out in (("train", False), ("eval", True)):
        chosen = [row for row, key in zip(rows.rows, key_of_row, strict=True) if (key in held_out) == is_held_out]
        fingerprint = f"{rows.fingerprint}/{name}/{share!r}/{seed}"
        sides.append(RowSet(chosen, rows.shapes, rows.sampled, fingerprint))
    return sides[0], sides[1]


def _content(row: Row) -> str:
    return json.dumps(row.messages if row.messages is not None else [row.prompt, row.completion], default=str)


@dataclass(frozen=True)
class Plan:
    """What a run will do; printed at its start and kept in run.json. `fill`: share of the packs' places in use.

    Of a stream, only packs a step and steps are known.
    """

    conversations: int | None
    documents: int | None
    tokens: int | None
    supervised_tokens: int | None
    packs: int | None
    fill: float | None
    packs_a_step: int
    steps_an_epoch: int | None
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(recipe: Recipe, data: Prepared | DocumentStream, args: SFTConfig) -> Plan:
    """Counts `data` as `RecipeTrainer` will; at the end of an epoch, what is left is a step of its own."""
    packs_a_micro_batch = args.per_device_train_batch_size * args.world_size
    packs_a_step = packs_a_micro_batch * args.gradient_accumulation_steps
    if isinstance(data, DocumentStream):
        return Plan(None, None, None, None, None, None, packs_a_step, None, args.max_steps)
    packs = len(PackSampler(data.lengths, recipe.max_length)) if recipe.packing else len(data.lengths)
    steps_an_epoch = math.ceil(math.ceil(packs / packs_a_micro_batch) / args.gradient_accumulation_steps)
    return Plan(
        conversations=data.counts.rows,
        documents=data.counts.documents,
        tokens=data.counts.tokens,
        supervised_tokens=data.counts.supervised,
        packs=packs,
        fill=data.counts.tokens / (packs * recipe.max_length) if recipe.packing else 1.0,
        packs_a_step=packs_a_step,
        steps_an_epoch=steps_an_epoch,
        steps=args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch),
    )


def print_plan(console: Console, recipe: Recipe, data: Prepared | DocumentStream, plan: Plan) -> None:
    """What was read, what is trained of it, and how many steps that makes; a warning where they are few."""
    for source, shape in data.shapes.items():
        console.print(f"{source}: {shape}", highlight=False, markup=False)
    unit = f"packs of {recipe.max_length:,} tokens" if recipe.packing else "documents, not packed"
    if isinstance(data, DocumentStream):
        console.print(
            f"Streamed: conversations, packs and their fill are unknown before they are read\n{unit}; "
            f"{plan.packs_a_step} a step: {plan.steps:,} steps in all"
        )
        longer = "training.max_steps"
    else:
        print_counts(console, data.counts)
        filled = f", {plan.fill:.1%} full" if recipe.packing else ""
        console.print(
            f"{plan.packs:,} {unit}{filled}; {plan.packs_a_step} a step: {plan.steps_an_epoch:,} steps an epoch, "
            f"{plan.steps:,} in all"
        )
        longer = "training.num_train_epochs"
    if plan.steps < FEW_STEPS:
        console.print(
            f"[yellow]Warning: {plan.steps} steps are few to learn from, because packing turns hundreds of chats into "
            f"tens of steps. Train longer ({longer}), put fewer packs into a step "
            "(training.per_device_train_batch_size=1 training.gradient_accumulation_steps=1), or give more data."
        )


def print_counts(console: Console, counts: Counts) -> None:
    """What is trained of the rows, and what became of the others."""
    share = counts.supervised / counts.tokens
    console.print(
        f"{counts.rows:,} conversations -> {counts.documents:,} documents of {counts.tokens:,} tokens, "
        f"{share:.1%} of them supervised"
    )
    notes = {
        "documents over max_length, truncated": counts.truncated,
        "documents over max_length, split": counts.split,
        **{f"documents dropped: {reason.replace('_', ' ')}": count for reason, count in counts.dropped.items()},
        **{COUNTS.get(name, name): count for name, count in counts.encoder.items()},
    }
    for note, count in notes.items():
        if count:
            console.print(f"  {count:,} {note}")
