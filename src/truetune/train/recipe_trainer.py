"""The trainer behind the command line: whole documents in, packs of our own making."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from truetune.data.breakdown import breakdown
from truetune.data.collate import collate_documents
from truetune.data.packing import PackSampler, pack_stream
from truetune.data.stream import BUFFER
from truetune.proof.drift import GIB, device_bytes, process_bytes
from truetune.proof.supervision import Documents
from truetune.train.batches import document_capacity, document_lengths, loads_without_effects, longest
from truetune.train.errors import TrainError
from truetune.train.metrics import TOKEN_KINDS, nll_by_kind, nll_by_source, source_names
from truetune.train.trainer import SFTTrainer

SOURCE_KEY = "source"  # of a batch


class RecipeTrainer(SFTTrainer):
    """`SFTTrainer` for data sets of documents (`input_ids` and `labels`, none longer than `args.max_length`).

    `per_device_train_batch_size` counts packs of at most `args.max_length` tokens, or documents with `pack=False`.
    Which documents share a pack is a pure function of lengths, seed and epoch. A `datasets.IterableDataset` is packed
    from a buffer, a pure function of its documents, seed and epoch, and begun again at its end, until `args.max_steps`.
    The evaluation loss is the mean over all supervised tokens, not over batches. `counts`: what became of the rows that
    the documents come from (`Counts.to_dict()`) and the recipe's `supervise`, for the audit. `sources`, `eval_sources`:
    where they come from, by the documents' column `source`; of more than one, each has a loss of its own
    (`loss_source_<name>`, see `source_names`).
    """

    def __init__(
        self,
        model,
        args,
        *,
        train_dataset,
        eval_dataset=None,
        pack: bool = True,
        counts: Mapping[str, Any] | None = None,
        sources: Sequence[str] = (),
        eval_sources: Sequence[str] = (),
        **keywords,
    ) -> None:
        self._pack = pack
        self._sources = {"train": list(sources), "eval": list(eval_sources)}
        self._source_T: torch.Tensor | None = None  # of the batch whose loss is computed
        self._nll: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self.counts = counts
        args.packing = args.padding_free = False
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=_collate,
            **keywords,
        )
        if len(sources) > 1:
            names = (f"loss_source_{name}: {path}" for name, path in zip(source_names(sources), sources, strict=True))
            self.report.add("losses by source", f"{len(sources)} sources", "; ".join(names))

    def _report_batches(self) -> None:
        streamed = isinstance(self.train_dataset, datasets.IterableDataset)
        over = f"buffers of {BUFFER:,} documents" if streamed else "the whole data set"
        how = f"packed, best-fit decreasing over {over}, {self.args.max_length} tokens"
        self.report.add("batches", "packing" if self._pack else "packing: false", how if self._pack else "padding-free")

    @property
    def packs(self) -> bool:
        return self._pack

    def _most_tokens(self, dataset, batch_size: int) -> int:
        if not self._pack:
            return super()._most_tokens(dataset, batch_size)
        assert self.args.max_length is not None
        if isinstance(dataset, datasets.IterableDataset):
            return batch_size * self.args.max_length
        return min(batch_size * self.args.max_length, max(2, int(document_lengths(dataset).sum())))

    def largest_batch_of(self, rows: int, evaluation: bool) -> dict[str, Any] | None:
        """The packs of the first epoch that hold most tokens; None of a stream, which is not known unread."""
        dataset = self.eval_dataset if evaluation else self.train_dataset
        if isinstance(dataset, datasets.IterableDataset):
            return None
        if isinstance(dataset, dict):
            dataset = max(dataset.values(), key=lambda part: int(document_lengths(part).max()))
        sampler = self._sampler(dataset, seed=0 if evaluation else self._seed)
        packs = list(sampler)
        lengths = document_lengths(dataset)
        fullest = longest([int(lengths[pack].sum()) for pack in packs], rows)
        documents = PackedDocuments(dataset, len(packs))
        return _collate([documents[packs[i]] for i in fullest])

    def document_capacity(self) -> int | None:
        if not self._pack or isinstance(self.train_dataset, datasets.IterableDataset):
            return super().document_capacity()
        # Of the first epoch: in others documents of as many tokens take each other's places.
        packs = self._sampler(self.train_dataset, self._seed)
        return document_capacity(np.array([len(pack) for pack in packs]), self._train_batch_size)

    def _rows_an_epoch(self) -> int | None:
        dataset = self.train_dataset
        packs: Any = None if isinstance(dataset, datasets.IterableDataset) else self._sampler(dataset, self._seed)
        return None if packs is None else len(packs)

    def first_batch(self) -> dict[str, Any] | None:
        dataset = self.train_dataset
        if isinstance(dataset, datasets.IterableDataset):
            return None
        packs = list(islice(self._sampler(dataset, self._seed), self._train_batch_size))
        documents = PackedDocuments(dataset, len(packs))
        return _collate([documents[pack] for pack in packs])

    def documents_to_audit(self, everything: bool) -> tuple[Documents, Documents | None, dict[str, Any] | None] | None:
        if isinstance(self.train_dataset, datasets.IterableDataset):
            return None
        evaluation = self.eval_dataset
        known = isinstance(evaluation, datasets.Dataset)
        counts = self.counts
        if counts is not None:
            counts = {**counts, **breakdown(self.train_dataset, self._sources["train"])}
        return Documents.of(self.train_dataset), Documents.of(evaluation) if known else None, counts

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> DataLoader:
        documents, size = self.train_dataset, self._train_batch_size
        if isinstance(documents, datasets.IterableDataset):
            capacity = self.args.max_length if self._pack else None
            return self._loader(_AsGiven(), _StreamedPacks(documents, capacity, self._seed), size, "train")
        return self._packs_loader(documents, self._sampler(documents, self._seed), size, "train")

    def reads_ahead(self) -> bool:
        return loads_without_effects(self)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]  # type: ignore[index]
        return self._packs_loader(dataset, self._sampler(dataset, seed=0), self.args.eval_batch_size, "eval")

    def _sampler(self, documents: datasets.Dataset, seed: int) -> Sampler[list[int]]:
        lengths = document_lengths(documents)
        if not self._pack:
            return _Singles(len(lengths), seed)
        assert self.args.max_length is not None
        return PackSampler(lengths, self.args.max_length, seed=seed)

    def _packs_loader(
        self, documents: datasets.Dataset, packs: Sampler[list[int]], batch_size: int, mode: str
    ) -> DataLoader:
        even = _EvenPacks(packs, multiple=batch_size * self.accelerator.num_processes)
        return self._loader(PackedDocuments(documents, len(even)), even, batch_size, mode)

    def _loader(self, dataset: Dataset, sampler: Sampler, batch_size: int, mode: str) -> DataLoader:
        loader: DataLoader = DataLoader(
            dataset,
            batch_sampler=BatchSampler(sampler, batch_size, drop_last=False),
            collate_fn=_collate_with_sources if len(self._sources[mode]) > 1 else _collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._source_T = inputs.pop(SOURCE_KEY, None)  # no model takes it
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _keep_metrics(self, mode, inputs, outputs) -> None:
        super()._keep_metrics(mode, inputs, outputs)
        rows_K = inputs["loss_rows"]
        sums = nll_by_kind(outputs.nll_K, inputs["labels"][0], rows_K)
        if self._source_T is not None:
            by_source = nll_by_source(outputs.nll_K, self._source_T[0], rows_K, len(self._sources[mode]))
            sums = torch.cat([sums, by_source], 1)
        self._nll[mode].append(sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode, prefix = ("train", "loss") if "loss" in logs else ("eval", "eval_loss")
        if self._nll[mode] and prefix in logs:
            sums = self.accelerator.reduce(torch.stack(self._nll[mode]).sum(0), "sum").tolist()
            self._nll[mode].clear()
            parts = [*TOKEN_KINDS, *(f"source_{name}" for name in source_names(self._sources[mode]))]
            # Of one source there are no sums of its own.
            named = zip(parts, *sums, strict=False)
            logs |= {f"{prefix}_{part}": total / count for part, total, count in named if count}
        if mode == "train" and "loss" in logs:
            used = device_bytes(self.args.device) or process_bytes()
            if used is not None:
                logs["memory_gib"] = round(used / GIB, 4)
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _fitting(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with _fitting(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        sums = self._device_metrics["eval"].peek()
        prefix = kwargs.get("metric_key_prefix", "eval")
        if sums.get("supervised") and output.metrics is not None:
            output.metrics[f"{prefix}_loss"] = sums["nll"] / sums["supervised"]
        return output


@contextmanager
def _fitting(checkpoint: str | None) -> Iterator[None]:
    """Where a changed run is allowed to go on, its checkpoint may fit no more."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise TrainError(
            f"{checkpoint} does not fit what is trained now ({why}): take back what changed, or start anew with "
            "--overwrite."
        ) from error


class PackedDocuments(Dataset):
    """`dataset[pack]` are the documents of a pack (a list of document indexes)."""

    def __init__(self, documents: datasets.Dataset, num_packs: int) -> None:
        columns = [name for name in ("input_ids", "labels", "source") if name in documents.column_names]
        self.documents = documents.select_columns(columns).with_format("numpy")
        self.num_packs = num_packs

    def __len__(self) -> int:
        return self.num_packs

    def __getitem__(self, pack: Sequence[int]) -> list[dict[str, Any]]:
        if not pack:
            return []
        rows = self.documents[list(pack)]
        return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


class _StreamedPacks(Sampler[list[dict[str, Any]]]):
    """The packs of a stream's documents themselves, pass after pass without an end: every rank gets full batches.

    Each rank reads the whole stream and takes its share, so that the packs of a step do not depend on the ranks.
    """

    def __init__(self, documents: datasets.IterableDataset, capacity: int | None, seed: int) -> None:
        self.documents, self.capacity, self.seed = documents, capacity, seed

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for epoch in count():
            yield from pack_stream(self.documents, self.capacity, BUFFER, seed=self.seed, epoch=epoch)


class _AsGiven(Dataset):
    """`dataset[pack]` is the pack."""

    def __getitem__(self, pack: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return pack


class _Singles(Sampler[list[int]]):
    """Every document alone, in an order that is a pure function of seed and epoch."""

    def __init__(self, num_documents: int, seed: int) -> None:
        self.num_documents, self.seed, self.epoch = num_documents, seed, 0

    def __len__(self) -> int:
        return self.num_documents

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.PCG64([self.seed, self.epoch]).random_raw(self.num_documents).argsort()
        return iter([[document] for document in order.tolist()])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class _EvenPacks(Sampler[list[int]]):
    """`packs`, and empty ones at the end so that every rank gets as many full batches: none repeats a document."""

    def __init__(self, packs: Sampler[list[int]], multiple: int) -> None:
        self.packs, self.multiple = packs, multiple

    def __len__(self) -> int:
        return -(-len(self.packs) // self.multiple) * self.multiple  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.packs
        for _ in range(len(self) - len(self.packs)):  # type: ignore[arg-type]
            yield []

    def set_epoch(self, epoch: int) -> None:
        self.packs.set_epoch(epoch)  # type: ignore[attr-defined]


def _collate(packs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    return collate_documents([document for pack in packs for document in pack])


def _collate_with_sources(packs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """A batch, and int64 [1, T], the source of each token's document."""
    batch = _collate(packs)
    sources = [int(document["source"]) for pack in packs for document in pack] or [0]
    batch[SOURCE_KEY] = torch.tensor(sources).repeat_interleave(batch["cu_seq_lens_q"].diff())[None]
    return batch
