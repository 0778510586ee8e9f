"""Files of rows, and the error that reading them gives."""

import json

import pytest

from truetune.data.errors import DataError
from truetune.data.rows import Source, read_rows

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def error_of(*sources):
    with pytest.raises(DataError) as caught:
        read_rows([Source(str(source)) if not isinstance(source, Source) else source for source in sources])
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message  # one sentence
    return message
