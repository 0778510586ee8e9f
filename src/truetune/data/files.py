"""One data file -> raw rows (dicts of columns), each with the place it stands at ("chats.jsonl:17").

Lines are counted from 1. Parquet has no lines: there it is the row's number. JSON and CSV may be gzipped (.gz).
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from truetune.data.errors import DataError
from truetune.data.json_text import MAX_DEPTH, has_surrogate_escapes, is_deeper, is_text, parse_json
from truetune.data.shapes import kind

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
PlacedRow = tuple[str, dict[str, Any]]

_BOM = b"\xef\xbb\xbf"
_GAP = re.compile(r"[\s,:]*")  # what stands between the values of valid JSON


def format_of(path: Path) -> str | None:
    """The format that a file's name says, or None if it is none of `FORMATS`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        return next((suffix for suffix in suffixes[-2:-1] if suffix in FORMATS and suffix != ".parquet"), None)
    return next((suffix for suffix in suffixes[-1:] if suffix in FORMATS), None)


def file_rows(path: Path) -> Iterator[PlacedRow]:
    """The raw rows of a file, read as they are asked for; raises `DataError`."""
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    gzipped = path.suffix.lower() == ".gz"
    with reading(str(path)), cast(IO[bytes], gzip.open(path) if gzipped else path.open("rb")) as file:
        yield from readers[format_of(path) or ""](file, str(path))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong with reading from the disk, in one sentence."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"there is no permission to read {error.filename or path}: change its mode or owner") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Columnar data gives every struct each field that any row has: a null in one says that this row has none."""

    def pruned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pruned(item) for key, item in value.items() if item is not None}
        return [pruned(item) for item in value] if isinstance(value, list) else value

    return {name: pruned(value) for name, value in row.items()}


def one_line(error: BaseException) -> str:
    """Another library's error, as a clause of our sentence."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split()).removesuffix(".").replace(". ", ", ")


def _jsonl_rows(lines: Iterable[bytes], path: str) -> Iterator[PlacedRow]:
    """One JSON object a line. A line ends at "\\n" alone: U+2028 and its like may stand inside a string."""
    for number, line in enumerate(lines, 1):
        text = _utf8(line.removeprefix(_BOM) if number == 1 else line, path, number)
        if not text.strip():
            continue
        origin = f"{path}:{number}"
        try:
            row = parse_json(text)
        except ValueError as error:
            raise DataError(f"{origin}: malformed JSON ({_reason(error)}), each line must be one JSON object") from None
        if row is not None:
            yield origin, _object(row, origin)


def _json_rows(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    """An array of objects, or an object with one list, which then is that array; JSON Lines so named are read too."""
    data = file.read()
    text = _utf8(data.removeprefix(_BOM), path, 1)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl_rows(io.BytesIO(data), path)
            return
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(f"{path}:{line}: malformed JSON ({_reason(error)}), repair the file") from None
    if isinstance(value, dict):
        lists = [name for name, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise DataError(f"{path}:1: the file must hold one list of rows, but its object has {len(lists)} lists")
    elif not isinstance(value, list):
        raise DataError(f"{path}:1: the file must hold a list of rows, but it holds {kind(value)}")
    if is_deeper(value, MAX_DEPTH):
        raise DataError(f"{path}:1: malformed JSON (nested too deeply), repair the file")
    yield from _array_elements(text, path)


def _array_elements(text: str, path: str) -> Iterator[PlacedRow]:
    """The elements of the one array in `text` (valid JSON: an array, or an object with one), with their lines."""
    decoder, has_surrogates = json.JSONDecoder(), has_surrogate_escapes(text)
    position = _skip_gap(text, 0)
    if text[position] == "{":
        position += 1
        while True:
            _, position = decoder.raw_decode(text, _skip_gap(text, position))  # a key
            position = _skip_gap(text, position)
            if text[position] == "[":
                break
            _, position = decoder.raw_decode(text, position)
    position, seen, line = position + 1, 0, 1
    while text[position := _skip_gap(text, position)] != "]":
        line, seen = line + text.count("\n", seen, position), position
        row, position = decoder.raw_decode(text, position)
        origin = f"{path}:{line}"
        if has_surrogates and not is_text(row):
            raise DataError(f"{origin}: the row has half of a \\ud escape, which is no character: repair it")
        if row is not None:
            yield origin, _object(row, origin)


def _skip_gap(text: str, position: int) -> int:
    gap = _GAP.match(text, position)
    assert gap is not None  # it matches nothing, too
    return gap.end()


def _csv_rows(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    """A header, then rows, separated by commas. A quoted field may span lines; a row is named by its first."""
    text = _utf8(file.read().removeprefix(_BOM), path, 1)
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is shorter than a long document
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            origin, line = f"{path}:{line}", reader.line_num + 1
            if not values:
                continue
            if not header:
                header = [name.strip() for name in values]
                if len(header) == 1 and re.search("[;\t|]", header[0]):
                    raise DataError(f"{origin}: the header is one column, {header[0]!r}: separate columns by commas")
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise DataError(f"{origin}: the header has the column {twice!r} twice: rename one")
            elif len(values) != len(header):
                raise DataError(
                    f"{origin}: the row has {len(values)} fields, the header has {len(header)}: check commas and quotes"
                )
            else:
                yield origin, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: malformed CSV ({error}): check the quotes") from None


def _parquet_rows(file: IO[bytes], path: str) -> Iterator[PlacedRow]:
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", without_nulls(row)
    except Exception as error:  # of many kinds: a date that Python does not have is an OverflowError
        raise DataError(f"{path} is no parquet file that can be read: {one_line(error)}") from None


def _utf8(data: bytes, path: str, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        byte = f"0x{data[error.start]:02x}"
        raise DataError(f"{path}:{line}: byte {column} ({byte}) is not UTF-8: save the file as UTF-8") from None


def _object(row: Any, origin: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{origin}: the row is {kind(row)}, not an object with columns")
    return row


def _reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')}, column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else one_line(error)
