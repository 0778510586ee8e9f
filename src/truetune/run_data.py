"""A recipe's data made ready to train: read, split, prepared, counted."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from truetune import demo
from truetune.data.chat import COUNTS
from truetune.data.errors import DataError
from truetune.data.packing import PackSampler
from truetune.data.prepare import Prepared, prepare
from truetune.data.rows import Row, RowSet, Source, read_rows
from truetune.recipe import Recipe
from truetune.train.config import SFTConfig

FEW_STEPS = 50


def prepare_data(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int, console: Console
) -> tuple[Prepared, Prepared | None]:
    """Documents to train on and, where the recipe asks for it, documents to evaluate on. Raises `DataError`."""
    sources = _resolved(recipe.data)
    with console.status("Reading data") as status:
        rows = read_rows(sources, seed=seed)
        eval_rows = None
        if isinstance(recipe.eval_data, float):
            rows, eval_rows = split_rows(rows, recipe.eval_data, seed)
        elif recipe.eval_data is not None:
            eval_rows = read_rows(_resolved(recipe.eval_data), seed=seed)

        def prepared(some: RowSet) -> Prepared:
            return prepare(
                sources,
                tokenizer,
                supervise=recipe.supervise,
                max_length=recipe.max_length,
                overflow=recipe.overflow,
                seed=seed,
                rows=some,
                progress=lambda done, of: status.update(f"Preparing data: {done:,} of {of:,} rows"),
            )

        return prepared(rows), None if eval_rows is None else prepared(eval_rows)


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
    """What a run will do; printed at its start and kept in run.json. `fill`: share of the packs' places in use."""

    conversations: int
    documents: int
    tokens: int
    supervised_tokens: int
    packs: int
    fill: float
    packs_a_step: int
    steps_an_epoch: int
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(recipe: Recipe, data: Prepared, args: SFTConfig) -> Plan:
    """Counts `data` as `RecipeTrainer` will; at the end of an epoch, what is left is a step of its own."""
    packs = len(PackSampler(data.lengths, recipe.max_length)) if recipe.packing else len(data.lengths)
    packs_a_micro_batch = args.per_device_train_batch_size * args.world_size
    steps_an_epoch = math.ceil(math.ceil(packs / packs_a_micro_batch) / args.gradient_accumulation_steps)
    return Plan(
        conversations=data.counts.rows,
        documents=data.counts.documents,
        tokens=data.counts.tokens,
        supervised_tokens=data.counts.supervised,
        packs=packs,
        fill=data.counts.tokens / (packs * recipe.max_length) if recipe.packing else 1.0,
        packs_a_step=packs_a_micro_batch * args.gradient_accumulation_steps,
        steps_an_epoch=steps_an_epoch,
        steps=args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_an_epoch),
    )


def print_plan(console: Console, recipe: Recipe, data: Prepared, plan: Plan) -> None:
    """What was read, what is trained of it, and how many steps that makes; a warning where they are few."""
    for source, shape in data.shapes.items():
        console.print(f"{source}: {shape}", highlight=False)
    counts = data.counts
    share = plan.supervised_tokens / plan.tokens
    console.print(
        f"{plan.conversations:,} conversations -> {plan.documents:,} documents of {plan.tokens:,} tokens, "
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
    filled = f"packs of {recipe.max_length:,} tokens, {plan.fill:.1%} full"
    unit = filled if recipe.packing else "documents, not packed"
    console.print(
        f"{plan.packs:,} {unit}; {plan.packs_a_step} a step: {plan.steps_an_epoch:,} steps an epoch, "
        f"{plan.steps:,} in all"
    )
    if plan.steps < FEW_STEPS:
        console.print(
            f"[yellow]Warning: {plan.steps} steps are few to learn from, because packing turns hundreds of chats into "
            "tens of steps. Train longer (training.num_train_epochs), put fewer packs into a step "
            "(training.per_device_train_batch_size=1 training.gradient_accumulation_steps=1), or give more data."
        )
