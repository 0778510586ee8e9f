import gzip
import json
import os

import pytest
from source_files import CHAT, error_of, write_jsonl

from truetune.data.rows import Source, read_rows

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def test_all_formats_give_the_same_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": 'ein\u2028zwei, "drei"\nvier', "completion": "ü"}, {"prompt": "😀", "completion": ""}]
    (tmp_path / "a.csv").write_text(
        'prompt,completion\r\n"ein\u2028zwei, ""drei""\nvier",ü\r\n😀,\r\n', encoding="utf-8-sig", newline=""
    )
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "crlf.jsonl").write_text(lines.replace("\n", "\r\n"), encoding="utf-8", newline="")
    (tmp_path / "ascii.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\nnull\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "object.json").write_text(json.dumps({"a[": {"b": [0]}, "v": "1,", "data": rows}, ensure_ascii=False))
    (tmp_path / "lines.json").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    fingerprints = set()
    for path in sorted(tmp_path.iterdir()):
        result = read_rows([Source(str(path))])
        assert [{"prompt": row.prompt, "completion": row.completion} for row in result.rows] == rows, path.name
        fingerprints.add(result.fingerprint)
    assert len(fingerprints) == 1


def test_rows_know_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b\u2028c"}\n{"text": "d"}\n')
    (tmp_path / "b.json").write_text('\n[ {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}\n]')
    (tmp_path / "c.json").write_text('{"n": 1,\n "data": [\n {"text": "a"},\n {"text": "b"}]}')
    (tmp_path / "d.csv").write_text('text\n"a\nb"\n\nc\n')
    lines = [row.origin.removeprefix(str(tmp_path)) for row in read_rows([Source(str(tmp_path / "*"))]).rows]
    assert lines == [
        *("/a.jsonl:2", "/a.jsonl:4", "/a.jsonl:5"),
        *("/b.json:2", "/b.json:4", "/b.json:5"),
        *("/c.json:3", "/c.json:4"),
        *("/d.csv:2", "/d.csv:5"),
    ]


def test_long_csv_fields_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "a" * 200_000)
    assert len(read_rows([Source(str(tmp_path / "a.csv"))]).rows[0].completion) == 200_000


def test_spaces_round_the_names_of_csv_columns_are_no_part_of_them(tmp_path):
    (tmp_path / "a.csv").write_text("prompt, completion\na, b\n")
    row = read_rows([Source(str(tmp_path / "a.csv"))]).rows[0]
    assert (row.prompt, row.completion) == ("a", " b")


def test_csv_can_hold_messages_as_json(tmp_path):
    cell = json.dumps(CHAT).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages,tools,system\n"{cell}",,\n')
    row = read_rows([Source(str(tmp_path / "a.csv"))]).rows[0]
    assert (row.messages, row.tools) == (CHAT, None)


def test_parquet_structs_lose_the_fields_that_other_rows_have(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    calling = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    other = {"type": "function", "function": {"name": "find", "arguments": {"text": "x"}}}
    rows = [{"messages": CHAT}, {"messages": calling}, {"messages": [CHAT[0], calling[1] | {"tool_calls": [other]}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = read_rows([Source(str(tmp_path / "a.parquet"))]).rows
    assert [row.messages for row in read] == [row["messages"] for row in rows]
    assert read[1].origin == f"{tmp_path}/a.parquet:2"


BAD_FILES = {
    "empty.jsonl": (b"", "empty.jsonl is empty"),
    "empty.json": (b" \n", "empty.json is empty"),
    "empty_list.json": (b"[]", "empty_list.json is empty"),
    "empty.csv": (b"", "empty.csv is empty"),
    "header.csv": (b"text\n", "header.csv is empty"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": "b"\n', "bad.jsonl:2: malformed JSON (Expecting ',' delimiter, column"),
    "open.jsonl": (b'{"text": "a', "open.jsonl:1: malformed JSON (Unterminated string starting, column 10)"),
    "array.jsonl": (b'[\n{"text": "a"}]', "array.jsonl:1: malformed JSON"),
    "list.jsonl": (b'{"text": "a"}\n["b"]\n', "list.jsonl:2: the row is a list, not an object"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "deep.jsonl:1: malformed JSON"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\ud83d"}\n', "half.jsonl:2: malformed JSON (half of a \\ud escape"),
    "half.json": (b'[{"text": "\\ud83d"}]', "half.json:1: the row has half of a \\ud escape"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl:2: byte 11 (0xe9) is not UTF-8"),
    "latin.json": (b'[\n{"text": "\xe9"}]', "latin.json:2: byte 11 (0xe9) is not UTF-8"),
    "latin.csv": (b"text\n\xe9\n", "latin.csv:2: byte 1 (0xe9) is not UTF-8"),
    "utf16.jsonl": ('{"text": "a"}'.encode("utf-16"), "utf16.jsonl:1: byte 1 (0xff) is not UTF-8"),
    "bad.json": (b'[{"text": "a"},\n {"text" "b"}]', "bad.json:2: malformed JSON (Expecting ':' delimiter, column 10)"),
    "lines.json": (b'{"text": "a"}\n{"text" "b"}\n', "lines.json:2: malformed JSON"),
    "scalars.json": (b'["a"]', "scalars.json:1: the row is text, not an object"),
    "number.json": (b"3", "number.json:1: the file must hold a list of rows, but it holds a number"),
    "lists.json": (b'{"a": [], "b": []}', "must hold one list of rows, but its object has 2 lists"),
    "double.csv": (b"text,text\na,b\n", "double.csv:1: the header has the column 'text' twice"),
    "semicolons.csv": (b"question;answer\na;b\n", "semicolons.csv:1: the header is one column, 'question;answer'"),
    "fields.csv": (b'text,id\n"a\nb",1\nc,2,3\n', "fields.csv:4: the row has 3 fields, the header has 2"),
    "quote.csv": (b'text\na\n"b\nc\n', "quote.csv:3: malformed CSV"),
    "bad.parquet": (b"PAR1 and no more", "bad.parquet is no parquet file that can be read"),
    "plain.jsonl.gz": (b'{"text": "a"}', "plain.jsonl.gz cannot be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 50)[:-9], "cut.jsonl.gz cannot be read"),
    "notes.txt": (b"text", "none of the formats that can be read: .jsonl, .json, .csv, .parquet"),
    "table.parquet.gz": (b"", "none of the formats that can be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_line(tmp_path, name):
    content, expected = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    message = error_of(path)
    assert expected in message
    assert str(path) in message


def test_truncated_parquet_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"text": str(i) * 100} for i in range(1000)]), path, compression="none")
    content = bytearray(path.read_bytes())
    content[200:3000] = b"\xff" * 2800
    path.write_bytes(content)
    assert "a.parquet is no parquet file that can be read" in error_of(path)
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, path)
    assert "a.parquet is empty" in error_of(path)


def test_a_file_without_permission_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    path.chmod(0)
    uid = os.geteuid()
    try:
        if uid == 0:
            os.seteuid(65534)  # root may read everything
        message = error_of(path)
    finally:
        os.seteuid(uid)
    assert "there is no permission to read" in message
    assert str(path) in message
