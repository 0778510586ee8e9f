"""Sources -> documents ready to pack: rows are read, encoded, cut to max_length, counted, and cached on disk."""

import hashlib
import json
import os
import signal
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from truetune.data.chat import COUNTS, Document, Encoder
from truetune.data.errors import DataError
from truetune.data.rows import Row, RowSet, Source, read_rows

Supervise = Literal["responses", "last_response", "all"]
Overflow = Literal["truncate", "split"]

IGNORE_INDEX = -100
ROWS_A_BATCH = 512
_ROWS_A_PROCESS = 2000
_COUNTS = b"truetune_counts"
_CHECKSUM_BYTES = 4


@dataclass
class Counts:
    """What became of the rows. A document is one sequence that is trained; an unrolled row gives several.

    truncated, split: documents over max_length of which something is trained; lost_tokens and lost_supervised are what
    cutting took from them, and cut_off_supervised what it took from documents of which nothing is left. dropped:
    documents without a supervised token, by reason; dropped_rows: rows that have no document left. encoder: the
    encoder's own counts. lengths: documents by their tokens ("129-256": 17).
    """

    rows: int
    documents: int = 0
    tokens: int = 0
    supervised: int = 0
    truncated: int = 0
    split: int = 0
    lost_tokens: int = 0
    lost_supervised: int = 0
    cut_off_supervised: int = 0
    dropped_rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    encoder: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Prepared:
    """documents: columns input_ids (list of int32), labels (the same, -100 where not supervised), row (int32, an index
    into the rows of the RowSet), source (int32, an index into `shapes`) and roles (list of uint8, an index into
    `TEXT_ROLES` a token), memory-mapped from the cache; lengths: int64 [documents], in tokens; shapes: the
    recognised shape of each source; fingerprint: a hash of all that decides the documents."""

    documents: datasets.Dataset
    lengths: np.ndarray
    counts: Counts
    shapes: dict[str, str]
    fingerprint: str
    from_cache: bool


class Batch(NamedTuple):
    """The trained documents of some rows. cut_off: of documents that lost all supervision to max_length, the row, the
    tokens up to the first supervised one, and all tokens."""

    documents: pa.Table
    counts: Counts
    cut_off: list[tuple[int, int, int]]


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    supervise: Supervise = "responses",
    chat_template: str | None = None,
    max_length: int | None,
    overflow: Overflow = "truncate",
    seed: int = 42,
    cache_dir: str | os.PathLike[str] | None = None,
    num_proc: int | None = None,
    rows: RowSet | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Documents of at most `max_length` tokens from `sources`, or from `rows` if they have been read already.

    Labels are made before anything is cut. overflow="truncate" keeps a document's first max_length tokens; "split" cuts
    it into pieces of max_length, in each of which the first token is not supervised, for nothing comes before it.
    Documents and pieces without a supervised token are dropped and counted. `num_proc` forked processes do the work, by
    default one a core where the rows are many; `progress(rows done, rows)` is called along the way. The result is
    cached in `cache_dir` (truetune/ in the Datasets cache), keyed by the rows, the encoder, the settings and the code.
    Raises DataError for unusable sources, and where no document is left.
    """
    check_max_length(max_length)
    if rows is None:
        rows = read_rows(sources, seed=seed)
    if not rows.rows:
        raise DataError("there are no rows to train on: name data that has some, or take a larger share of it")
    encoder = Encoder(tokenizer, chat_template=chat_template, supervise=supervise)
    fingerprint = _fingerprint(rows.fingerprint, encoder.fingerprint, max_length, overflow)
    directory = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "truetune"
    path = directory / f"{fingerprint}.arrow"

    counts = _cached_counts(path)
    from_cache = counts is not None
    if counts is None:
        work = partial(_prepare_part, encoder, rows.rows, max_length, overflow)
        batches: list[Batch] = []
        for batch in _batches(work, len(rows.rows), num_proc or _num_proc(len(rows.rows))):
            batches.append(batch)
            if progress is not None:
                progress(min(len(batches) * ROWS_A_BATCH, len(rows.rows)), len(rows.rows))
        counts = total(batch.counts for batch in batches)
        if not counts.documents:
            cut_off = [lost for batch in batches for lost in batch.cut_off]
            raise DataError(why_nothing_is_left(counts, cut_off, supervise, max_length))
        table = pa.concat_tables(batch.documents for batch in batches)
        counts.lengths = _histogram(_lengths(table))
        _write(path, table, counts)
    documents = datasets.Dataset.from_file(str(path))
    return Prepared(documents, _lengths(documents.data.table), counts, rows.shapes, fingerprint, from_cache)


def check_max_length(max_length: int | None) -> None:
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length is {max_length}, but a document of fewer than 2 tokens has nothing to predict")


def _batches(work: Callable[[int], Batch], num_rows: int, num_proc: int) -> Iterator[Batch]:
    """The batches of rows in their order, made by this process or by `num_proc` others."""
    first_rows = range(0, num_rows, ROWS_A_BATCH)
    if num_proc == 1:
        yield from map(work, first_rows)
        return
    with ProcessPoolExecutor(num_proc, get_context("fork"), _start_worker, (work,)) as pool:
        yield from pool.map(_in_worker, first_rows)


_work: Callable[[int], Batch]  # of a worker process


def _start_worker(work: Callable[[int], Batch]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tokenizer's threads do not live on in a forked process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer


def _in_worker(first_row: int) -> Batch:
    return _work(first_row)


def _num_proc(num_rows: int) -> int:
    """Processes that pay: rendering chat templates is Python, and a fork costs as much as some hundred rows."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    return max(1, min(cores, num_rows // _ROWS_A_PROCESS))


def _prepare_part(
    encoder: Encoder, rows: Sequence[Row], max_length: int | None, overflow: Overflow, first_row: int
) -> Batch:
    return prepare_batch(encoder, rows[first_row : first_row + ROWS_A_BATCH], max_length, overflow, first_row)


def prepare_batch(
    encoder: Encoder, rows: Sequence[Row], max_length: int | None, overflow: Overflow, first_row: int
) -> Batch:
    """Encodes rows, of which the first is number `first_row`, cuts their documents, and drops the unsupervised."""
    documents, encoder_counts = encoder.encode(rows, first_row)
    counts = Counts(rows=len(rows), encoder=dict(encoder_counts))
    dropped: Counter[str] = Counter()
    cut_off: list[tuple[int, int, int]] = []
    trained: list[Document] = []
    for document in documents:
        supervised = _num_supervised(document)
        pieces = [piece for piece in _cut(document, max_length, overflow) if _num_supervised(piece)]
        trained += pieces
        tokens = len(document.input_ids)
        if not supervised:
            dropped["nothing_supervised"] += 1
        elif not pieces:
            dropped["supervised_tokens_cut_off"] += 1
            counts.cut_off_supervised += supervised
            first = next(i for i, label in enumerate(document.labels) if label != IGNORE_INDEX)
            cut_off.append((document.row, first + 1, tokens))
        elif max_length is not None and tokens > max_length:
            counts.split += overflow == "split"
            counts.truncated += overflow == "truncate"
            counts.lost_tokens += tokens - sum(len(piece.input_ids) for piece in pieces)
            counts.lost_supervised += supervised - sum(map(_num_supervised, pieces))
    counts.dropped = dict(dropped)
    counts.dropped_rows = len(rows) - len({document.row for document in trained})
    counts.documents = len(trained)
    counts.tokens = sum(len(document.input_ids) for document in trained)
    counts.supervised = sum(map(_num_supervised, trained))
    return Batch(_table(trained), counts, cut_off)


def total(parts: Iterable[Counts]) -> Counts:
    total = Counts(rows=0)
    for part in parts:
        for name, value in vars(part).items():
            before = getattr(total, name)
            added = before + value if isinstance(value, int) else dict(Counter(before) + Counter(value))
            setattr(total, name, added)
    return total


def _cut(document: Document, max_length: int | None, overflow: str) -> list[Document]:
    tokens = len(document.input_ids)
    if max_length is None or tokens <= max_length:
        return [document]
    starts = range(0, tokens, max_length) if overflow == "split" else range(1)
    return [
        Document(
            document.input_ids[start : start + max_length],
            [IGNORE_INDEX, *document.labels[start + 1 : start + max_length]],
            document.row,
            document.source,
            document.roles[start : start + max_length],
        )
        for start in starts
    ]


def _num_supervised(document: Document) -> int:
    return len(document.labels) - document.labels.count(IGNORE_INDEX)


def _table(documents: Sequence[Document]) -> pa.Table:
    offsets = np.cumsum([0, *(len(document.input_ids) for document in documents)], dtype=np.int32)

    def column(values: Iterable[int], length: int) -> pa.Array:
        return pa.array(np.fromiter(values, np.int32, length))

    tokens = int(offsets[-1])
    ids = column(chain.from_iterable(document.input_ids for document in documents), tokens)
    labels = column(chain.from_iterable(document.labels for document in documents), tokens)
    return pa.table(
        {
            "input_ids": pa.ListArray.from_arrays(offsets, ids),
            "labels": pa.ListArray.from_arrays(offsets, labels),
            "row": column((document.row for document in documents), len(documents)),
            "source": column((document.source for document in documents), len(documents)),
            "roles": pa.ListArray.from_arrays(
                offsets, pa.array(np.frombuffer(b"".join(document.roles for document in documents), np.uint8))
            ),
        }
    )


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    """Documents in at most 16 ranges of tokens, as wide as a power of two."""
    longest = int(lengths.max(initial=1))
    width = max(1, 1 << ((longest - 1) // 16).bit_length())
    counts = np.bincount((lengths - 1) // width).tolist()
    return {f"{i * width + 1}-{(i + 1) * width}": count for i, count in enumerate(counts)}


def why_nothing_is_left(
    counts: Counts, cut_off: Sequence[tuple[int, int, int]], supervise: Supervise, max_length: int | None
) -> str:
    """A sentence about `counts` of rows that have no document left, of which `cut_off` had supervised tokens."""
    num_rows = counts.rows
    if not cut_off:
        notes = "; ".join(f"{count} {COUNTS[name]}" for name, count in counts.encoder.items())
        return (
            f"none of the {num_rows} rows has a token to learn from with supervise: {supervise}; a row needs an "
            f"assistant turn or a completion that is not empty{f' ({notes})' if notes else ''}"
        )
    lost = len({row for row, _, _ in cut_off})
    first = min(up_to_first for _, up_to_first, _ in cut_off)
    whole = max(tokens for _, _, tokens in cut_off)
    rest = f", and the other {num_rows - lost} had none" if lost < num_rows else ""
    return (
        f"{lost} of {num_rows} rows lost all supervised tokens at max_length {max_length}{rest}: raise it (the first "
        f"supervised token is kept from {first} on, every token from {whole} on)"
    )


def _fingerprint(*settings: str | int | None) -> str:
    """Keys the cache: the settings, the code of this package, and the versions of what renders and tokenizes."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    versions = [version(package) for package in ("transformers", "tokenizers", "jinja2")]
    return hashlib.sha256(json.dumps([*settings, code.hexdigest(), *versions]).encode()).hexdigest()[:32]


def _write(path: Path, table: pa.Table, counts: Counts) -> None:
    """An Arrow stream, the counts in its metadata, and a checksum; written beside and renamed into place."""
    table = table.replace_schema_metadata({_COUNTS: json.dumps(counts.to_dict())})
    beside = path.with_suffix(f".{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pa.ipc.new_stream(str(beside), table.schema) as writer:
            writer.write_table(table)
        checksum = zlib.crc32(_bytes(beside))
        with beside.open("ab") as file:
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))
        beside.replace(path)
    except OSError as error:
        raise DataError(
            f"prepared data cannot be cached in {path.parent} ({error.strerror or error}): set HF_DATASETS_CACHE to a "
            "directory that can be written"
        ) from None
    finally:
        with suppress(OSError):
            beside.unlink()


def _cached_counts(path: Path) -> Counts | None:
    """The counts of a cached file, or None where there is none or it is damaged."""
    if not path.is_file() or path.stat().st_size <= _CHECKSUM_BYTES:
        return None
    content = _bytes(path)
    if zlib.crc32(content[:-_CHECKSUM_BYTES]) != int.from_bytes(content[-_CHECKSUM_BYTES:], "little"):
        return None
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return Counts(**json.loads(reader.schema.metadata[_COUNTS]))


def _bytes(path: Path) -> memoryview:
    return np.memmap(path, np.uint8, "r").data


def _lengths(table: pa.Table) -> np.ndarray:
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in table["input_ids"].chunks]).astype(np.int64)
