"""Files and Hub data sets -> rows, each with the place it came from.

A source is a file (`files.py` reads it), a directory or glob of files, a directory written by Datasets' `save_to_disk`,
or a Hub name. Its rows have one shape (`shapes.py` lists them), told from the first.
"""

import glob
import hashlib
import marshal
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from truetune.data.errors import DataError
from truetune.data.files import FORMATS, PlacedRow, file_rows, format_of, one_line, reading, without_nulls
from truetune.data.shapes import Row, Shape, nearest, recognise, to_row

_SPLIT_OF = dict.fromkeys(("test", "testing"), "test")
_SPLIT_OF |= dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    path: a file, directory, glob, `save_to_disk` directory, or Hub name
    split: of a Hub data set or `save_to_disk` directory; a file has the split train alone
    weight: the share of its rows in the result, against the other sources' (see `read_rows`)
    columns: our column names to theirs: `{messages: dialog}`, `{text: body}`, `{instruction: q, output: a}`...
        `{prompt: question, completion: answer}` makes raw text, as in TRL; `{user: question, assistant: answer}`, also
        with `system`, makes a chat
    revision, name: of a Hub data set: the branch, tag or commit; the configuration
    """

    path: str
    split: str = "train"
    weight: float = 1.0
    columns: dict[str, str] | None = None
    revision: str | None = None
    name: str | None = None


@dataclass
class RowSet:
    """What `read_rows` read.

    rows: of all sources, in their order
    shapes, sampled: the shape's name and (rows taken, rows there) by the source's path, numbered where it comes again
    fingerprint: a hash of the rows and their order, wherever they came from
    """

    rows: list[Row]
    shapes: dict[str, str] = field(default_factory=dict)
    sampled: dict[str, tuple[int, int]] = field(default_factory=dict)
    fingerprint: str = ""


def read_rows(sources: Sequence[Source], *, seed: int = 42) -> RowSet:
    """Reads, recognises and normalises all rows of all sources.

    Equal weights take every row. Otherwise the rows are in proportion to the weights: the source with the fewest rows
    for its weight is taken whole, and of each other one as many as its share asks for, drawn by `seed` without
    replacement, kept in order. Nothing is repeated or shuffled.

    Raises `DataError`, naming file and line where there is one, for whatever cannot be read or fits no shape.
    """
    shapes: dict[str, str] = {}
    read: dict[str, list[Row]] = {}
    for number, (label, source) in enumerate(_labelled(sources)):
        shape, rows = _recognised(source, number)
        shapes[label], read[label] = shape.name, list(rows)

    sizes = _sample_sizes([len(rows) for rows in read.values()], [source.weight for source in sources])
    sampled: list[Row] = []
    for index, (label, size) in enumerate(zip(read, sizes, strict=True)):
        if size == 0:
            raise DataError(
                f"the weight of {label} is so small that none of its rows is taken: raise it, or drop {label}"
            )
        chosen = sorted(random.Random(f"{seed}/{index}").sample(range(len(read[label])), size))
        sampled += [read[label][i] for i in chosen] if size < len(read[label]) else read[label]
    taken = {label: (size, len(read[label])) for label, size in zip(read, sizes, strict=True)}
    return RowSet(sampled, shapes, taken, _fingerprint(sampled))


@dataclass
class RowStream:
    """`rows`: read as they are asked for; `shapes`: as those of a `RowSet`."""

    rows: Iterator[Row]
    shapes: dict[str, str]

    def first(self, count: int) -> RowSet:
        """The next `count` rows, to look at."""
        rows = list(islice(self.rows, count))
        return RowSet(rows, self.shapes, fingerprint=_fingerprint(rows))


def stream_rows(sources: Sequence[Source]) -> RowStream:
    """The rows of all sources, taken from each in proportion to its weight, in the order of each.

    Equal weights give every row. Otherwise the rows end with the first source that ends, so that the shares are those
    of `read_rows`. Raises as `read_rows`: for a source that cannot be opened at once, for a row as it is read.
    """
    opened = [
        (label, *_recognised(source, number, streaming=True))
        for number, (label, source) in enumerate(_labelled(sources))
    ]
    rows = _in_turn([rows for _, _, rows in opened], [source.weight for source in sources])
    return RowStream(rows, {label: shape.name for label, shape, _ in opened})


def _in_turn(streams: Sequence[Iterator[Row]], weights: Sequence[float]) -> Iterator[Row]:
    taken = [0] * len(streams)
    going = list(range(len(streams)))
    while going:
        behind = min(going, key=lambda i: (taken[i] + 1) / weights[i])
        if (row := next(streams[behind], None)) is not None:
            taken[behind] += 1
            yield row
        elif len(set(weights)) > 1:
            return
        else:
            going.remove(behind)


def _labelled(sources: Sequence[Source]) -> list[tuple[str, Source]]:
    """Each source with its path, numbered where that comes again. Raises `DataError` where there is none."""
    if not sources:
        raise DataError("no data was given: name a file, a directory or a Hub data set")
    times: Counter[str] = Counter()
    labelled = []
    for source in sources:
        times[source.path] += 1
        labelled.append((source.path if times[source.path] == 1 else f"{source.path} ({times[source.path]})", source))
    return labelled


def _recognised(source: Source, number: int, *, streaming: bool = False) -> tuple[Shape, Iterator[Row]]:
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise DataError(f"the weight of {source.path} is {source.weight}: give a number above 0")
    columns = source.columns or {}
    raw_rows = _raw_rows(source, streaming)
    first = next(raw_rows, None)
    if first is None:
        raise DataError(f"{source.path} is empty: it holds no rows to train on")
    try:
        shape = recognise(first[1], columns)
    except DataError as error:
        raise DataError(f"{first[0]}: {error}") from None
    return shape, _converted(chain([first], raw_rows), shape, columns, number)


def _converted(raw_rows: Iterable[PlacedRow], shape: Shape, columns: Mapping[str, str], source: int) -> Iterator[Row]:
    for origin, raw in raw_rows:
        try:
            row = to_row(raw, shape, columns)
        except DataError as error:
            raise DataError(f"{origin}: {error}") from None
        row.origin, row.source = origin, source
        yield row


def _sample_sizes(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    if len(set(weights)) == 1:
        return list(counts)
    rows_per_weight = min(count / weight for count, weight in zip(counts, weights, strict=True))
    return [min(count, round(rows_per_weight * weight)) for count, weight in zip(counts, weights, strict=True)]


def _fingerprint(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        content = (row.messages, row.prompt, row.completion, row.tools, row.template_kwargs, row.first_supervised,
                   row.source)  # fmt: skip
        try:
            digest.update(marshal.dumps(content, 2))  # version 2 has no references: equal values give equal bytes
        except ValueError:  # a date or decimal of a parquet file, kept in a message
            digest.update(repr(content).encode("utf-8"))
    return digest.hexdigest()


# ---- sources ---------------------------------------------------------------------------------------------------------


def _raw_rows(source: Source, streaming: bool) -> Iterator[PlacedRow]:
    if not source.path:
        raise DataError("the path of the data is empty: name a file, a directory or a Hub data set")
    path = Path(os.path.expanduser(source.path))
    with reading(source.path):
        is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        is_local = path.exists() or any(character in source.path for character in "*?[")
    if not is_local:
        yield from _hub_rows(source, streaming)
        return
    for option, given in (("revision", source.revision), ("name", source.name)):
        if given:
            raise DataError(f"{source.path} is no Hub data set and has no {option} {given}: drop the {option}")
    if is_saved:
        yield from _saved_dataset_rows(path, source)
        return
    if source.split != "train":
        raise DataError(
            f"{source.path} has the split train alone, not {source.split}: name the file that holds that split"
        )
    for file in _files(path):
        yield from file_rows(file)


def _files(path: Path) -> list[Path]:
    formats = ", ".join(FORMATS)
    if path.is_file() and format_of(path) is None:
        raise DataError(f"{path} has none of the formats that can be read: {formats}")
    if path.is_file():
        return [path]
    is_directory = path.is_dir()
    with reading(str(path)):
        found = path.iterdir() if is_directory else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(file for file in found if format_of(file) and not file.name.startswith(".") and file.is_file())
    if not files:
        raise DataError(f"no file {'in' if is_directory else 'matches'} {path} that can be read: {formats}")
    if is_directory:
        _refuse_several_splits(files, path)
    return files


def _refuse_several_splits(files: Sequence[Path], path: Path) -> None:
    """Else the test file that lies beside the training file would be trained on unseen."""
    splits = {}
    for file in files:
        words = re.split(r"[\W_\d]+", file.stem.lower())
        splits[file.name] = next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "train")
    if len(set(splits.values())) > 1:
        raise DataError(f"{path} holds files of several splits ({', '.join(splits)}): name the file to read, or a glob")


def _hub_rows(source: Source, streaming: bool) -> Iterator[PlacedRow]:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path) or format_of(Path(source.path)):
        raise DataError(f"there is no file or directory {source.path}{_nearest_file(source.path)}")
    import datasets

    try:
        dataset = datasets.load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=streaming
        )
    except Exception as error:  # of many kinds, those of the HTTP client among them
        mend = ", go online or name a file" if isinstance(error, ConnectionError) else ""
        raise DataError(
            f"{source.path} is no file or directory{_nearest_file(source.path)}, "
            f"and it cannot be loaded as a Hub data set: {one_line(error)}{mend}"
        ) from None
    try:
        yield from _dataset_rows(dataset, source.path)
    except Exception as error:  # of a stream, which is fetched as it is read
        raise DataError(f"{source.path} cannot be read on from the Hub: {one_line(error)}") from None


def _nearest_file(path: str) -> str:
    parent = Path(os.path.expanduser(path)).parent
    if not parent.is_dir():
        return f", nor a directory {parent}"
    close = nearest(Path(path).name, (file.name for file in parent.iterdir()))
    return f" (did you mean {parent / close}?)" if close else ""


def _saved_dataset_rows(path: Path, source: Source) -> Iterator[PlacedRow]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds: its files are JSON of any shape
        raise DataError(f"{source.path} is no data set that can be loaded: {one_line(error)}") from None
    splits = dataset if isinstance(dataset, datasets.DatasetDict) else {"train": dataset}
    if source.split not in splits:
        raise DataError(f"{source.path} has no split {source.split}: its splits are {', '.join(map(str, splits))}")
    try:
        yield from _dataset_rows(splits[source.split], source.path)
    except Exception as error:
        raise DataError(f"{source.path} is no data set that can be read: {one_line(error)}") from None


def _dataset_rows(dataset: Any, path: str) -> Iterator[PlacedRow]:
    number = 0
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield f"{path}:{number}", without_nulls(dict(zip(batch, values, strict=True)))
