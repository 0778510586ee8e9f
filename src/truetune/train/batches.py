"""The largest batch that a trainer can meet, without a look at its data loader, whose order it must not change."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from truetune.data.collate import UnpaddingCollator, collate_documents
from truetune.proof.excerpt import parts_of
from truetune.proof.supervision import Documents

COLLATED = 64  # rows at a time, whose labels are looked at


def document_lengths(documents: datasets.Dataset) -> np.ndarray:
    """Tokens of each document, int64 [D], read from the Arrow offsets without loading the tokens."""
    import pyarrow.compute as pc

    table = documents.with_format("arrow").select_columns(["input_ids"])[:]
    return pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)


def row_lengths(dataset: Any) -> np.ndarray | None:
    """Tokens of each row of a prepared data set (of several: of all), or None where they cannot be known unread."""
    if isinstance(dataset, dict):
        lengths = [row_lengths(part) for part in dataset.values()]
        known = [part for part in lengths if part is not None]
        return np.concatenate(known) if known and len(known) == len(lengths) else None
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names or not len(dataset):
        return None
    return document_lengths(dataset)


def longest(lengths: Sequence[int] | np.ndarray, count: int) -> list[int]:
    """The places of the `count` largest, the first of equals."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return order[:count].tolist()


def documents_each(dataset: Any) -> np.ndarray | None:
    """Documents of each row; None where they cannot be known unread. TRL's packing says of each row what it holds, and
    any other row is one document."""
    lengths = row_lengths(dataset)
    if lengths is None or not isinstance(dataset, datasets.Dataset):
        return None
    packed = dataset.features.get("seq_lengths")
    if not isinstance(packed, datasets.List | datasets.LargeList):
        return np.ones(len(lengths), np.int64)
    import pyarrow.compute as pc

    table = dataset.with_format("arrow").select_columns(["seq_lengths"])[:]
    return pc.list_value_length(table["seq_lengths"]).to_numpy()


def document_capacity(counts: np.ndarray, batch_size: int) -> int:
    """What batches of rows with so many documents hardly exceed: the rows with most, or, where rows meet by chance,
    3.5 standard deviations above the mean, which a few of thousands exceed."""
    by_chance = batch_size * counts.mean() + 3.5 * counts.std() * math.sqrt(batch_size)
    most = int(counts[longest(counts, batch_size)].sum())
    return most if batch_size == 1 else min(most, math.ceil(by_chance))


def planned_steps(args: Any, rows: int | None, batch_size: int) -> int | None:
    """Optimizer steps as Transformers counts them; an epoch has `rows`, of which a rank takes `batch_size` at once."""
    if args.max_steps > 0 or rows is None:
        return args.max_steps if args.max_steps > 0 else None
    whole = math.floor if args.dataloader_drop_last else math.ceil
    micro_batches = whole(rows / (batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * max(1, math.ceil(micro_batches / args.gradient_accumulation_steps)))


def full_batch(batch_size: int, length: int) -> dict[str, Any]:
    """A packed batch of documents of `length` tokens: as much as data that is not read before can hold."""
    document = {"input_ids": [0] * length, "labels": [0] * length}
    return collate_documents([document] * batch_size)


def batch_of_longest_rows(
    trainer: Any, dataset: Any, batch_size: int, *, padded: bool = False
) -> dict[str, Any] | None:
    """The longest rows through the trainer's own collator, as its data loader would hand them over, `padded` where that
    does not pack; of several data sets, those of the one with the longest row."""
    lengths = row_lengths(dataset)
    if lengths is None:
        return None
    if isinstance(dataset, dict):
        dataset = max(dataset.values(), key=lambda part: int(document_lengths(part).max()))
        lengths = document_lengths(dataset)
    return batch_of_rows(trainer, dataset, longest(lengths, batch_size), padded=padded)


def batch_of_rows(
    trainer: Any, dataset: datasets.Dataset, which: Iterable[int], *, padded: bool = False
) -> dict[str, Any]:
    rows = trainer._remove_unused_columns(dataset, description="rehearsal")
    collate = trainer.data_collator if padded or trainer._unpadding_off else unpadding(trainer.data_collator)
    return collate([rows[i] for i in which])


def unpadding(collator: Any) -> UnpaddingCollator:
    return UnpaddingCollator(collator, reads_lists=type(collator) is DataCollatorForLanguageModeling)


def has_trl_collator(trainer: Any) -> bool:
    return type(trainer.data_collator).__module__.startswith("trl.")


def loads_without_effects(trainer: Any) -> bool:
    """Whether nobody can tell when rows of the training data are read: they lie there, and only known code runs."""
    dataset, args = trainer.train_dataset, trainer.args
    known = {"transformers", "trl", "truetune"}
    loaders = [getattr(trainer, name) for name in ("get_train_dataloader", "_get_dataloader", "_get_train_sampler")]
    return (
        isinstance(dataset, datasets.Dataset)
        and dataset.format["type"] != "custom"
        and all(loader.__module__.split(".")[0] in known for loader in loaders)
        and args.dataloader_num_workers == 0
        and (args.dataloader_pin_memory or args.device.type == "cpu")  # copies from other memory are waited for
        and not trainer.accelerator.dataloader_config.use_stateful_dataloader
    )


def documents_of_rows(trainer: Any, dataset: datasets.Dataset, most: int | None) -> Documents:
    """The first `most` rows as TRL's collator labels them; of rows that were packed, their documents."""
    rows = trainer._remove_unused_columns(dataset, description="audit")
    indices = range(min(len(rows), most or len(rows)))
    collate = unpadding(trainer.data_collator)
    found = [
        document
        for first in indices[::COLLATED]
        for document in parts_of(collate([rows[i] for i in indices[first : first + COLLATED]]))
    ]
    return Documents([ids.numpy() for ids, _ in found], [labels.numpy() for _, labels in found])


def evaluation_documents(trainer: Any, most: int | None) -> Documents | None:
    """Those of each evaluation set; None where there is none, or its rows are not known unread."""
    given = trainer.eval_dataset
    parts = list(given.values()) if isinstance(given, dict) else [given]
    if row_lengths(given) is None or not all(isinstance(part, datasets.Dataset) for part in parts):
        return None
    return Documents.joined([documents_of_rows(trainer, part, most) for part in parts])
