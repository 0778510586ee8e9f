"""Sources too large to read whole -> documents made as they are asked for: none is cached, none counted ahead."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from truetune.data.chat import Encoder
from truetune.data.errors import DataError
from truetune.data.prepare import (
    ROWS_A_BATCH,
    Counts,
    Overflow,
    Supervise,
    check_max_length,
    prepare_batch,
    total,
    why_nothing_is_left,
)
from truetune.data.rows import Source, stream_rows

BUFFER = 4096  # documents that the packs of a stream are made of at a time: they fill 99.9% of packs of 2,048 on GSM8K
_ROWS_WITHOUT_A_DOCUMENT = 20 * ROWS_A_BATCH  # after which a stream is taken to have none


class DocumentStream:
    """What `prepare` makes of rows, in their order, from sources that are read as the documents are asked for.

    documents: `input_ids` and `labels` (int32 arrays) and `source` (an index into `shapes`) of each; every iteration is
        a pass over the sources from the start. It raises `DataError` for a row that cannot be read, and where no
        document is to be had.
    counts: of the rows read so far, each counted once however often it is read; its `lengths` stay empty
    shapes: the recognised shape of each source
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        supervise: Supervise = "responses",
        chat_template: str | None = None,
        max_length: int | None,
        overflow: Overflow = "truncate",
    ) -> None:
        check_max_length(max_length)
        self._sources, self._supervise = sources, supervise
        self._max_length, self._overflow = max_length, overflow
        self._encoder = Encoder(tokenizer, chat_template=chat_template, supervise=supervise)
        self._cut_off: list[tuple[int, int, int]] = []
        self.counts = Counts(rows=0)
        self.shapes = stream_rows(sources).shapes
        self.documents = datasets.IterableDataset.from_generator(self._one_pass)
        next(iter(self.documents))  # what is wrong with the sources shows before a model is loaded

    def _one_pass(self) -> Iterator[dict[str, Any]]:
        first_row = 0
        stream = stream_rows(self._sources).rows
        while rows := list(islice(stream, ROWS_A_BATCH)):
            batch = prepare_batch(self._encoder, rows, self._max_length, self._overflow, first_row)
            if first_row == self.counts.rows:
                self.counts = total([self.counts, batch.counts])
                self._cut_off += batch.cut_off if not self.counts.documents else []
            first_row += len(rows)
            if not self.counts.documents and first_row >= _ROWS_WITHOUT_A_DOCUMENT:
                break
            yield from _documents(batch.documents)
        if not self.counts.documents:
            raise DataError(why_nothing_is_left(self.counts, self._cut_off, self._supervise, self._max_length))


def _documents(table: pa.Table) -> Iterator[dict[str, Any]]:
    ids, labels = (table[name].combine_chunks() for name in ("input_ids", "labels"))
    ends = ids.offsets.to_numpy()[1:-1]
    columns = (np.split(column.values.to_numpy().copy(), ends) for column in (ids, labels))
    if not len(table):
        return
    for ids_T, labels_T, source in zip(*columns, table["source"].to_pylist(), strict=True):
        yield {"input_ids": ids_T, "labels": labels_T, "source": source}
