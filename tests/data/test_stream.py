"""A stream gives the documents that preparing the whole data set gives, and no more than it is asked for."""

import itertools
import json

import numpy as np
import pytest

from truetune.data.errors import DataError
from truetune.data.prepare import prepare
from truetune.data.rows import Source
from truetune.data.stream import DocumentStream


def chats(path, rows):
    lines = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return [Source(str(path))]


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_a_stream_gives_the_documents_and_counts_of_the_whole(tmp_path, tokenizer, gsm8k_rows, overflow):
    rows = [(row["question"], row["answer"]) for row in gsm8k_rows[:1100]]  # three batches
    rows[7] = ("Is this row left out?", "")
    sources = chats(tmp_path / "chats.jsonl", rows)
    whole = prepare(sources, tokenizer, max_length=200, overflow=overflow, cache_dir=tmp_path)
    stream = DocumentStream(sources, tokenizer, max_length=200, overflow=overflow)
    for _ in range(2):  # every pass gives the same, and counts no row again
        documents = list(stream.documents)
        assert len(documents) == len(whole.lengths)
        for document, expected in zip(documents, whole.documents, strict=True):
            assert np.array_equal(document["input_ids"], expected["input_ids"])
            assert np.array_equal(document["labels"], expected["labels"])
        assert {**stream.counts.to_dict(), "lengths": whole.counts.lengths} == whole.counts.to_dict()
    assert stream.shapes == whole.shapes


def test_a_stream_is_read_no_further_than_it_is_asked(tmp_path, tokenizer):
    sources = chats(tmp_path / "chats.jsonl", [("How many?", str(number)) for number in range(1500)])
    with open(sources[0].path, "a") as file:
        file.write("{\n")
    stream = DocumentStream(sources, tokenizer, max_length=64)
    assert len(list(itertools.islice(stream.documents, 600))) == 600
    assert stream.counts.rows == 1024
    with pytest.raises(DataError, match=r"chats\.jsonl:1501: malformed JSON"):
        list(stream.documents)


def test_a_stream_with_nothing_to_learn_from_says_so_before_it_ends(tmp_path, tokenizer):
    sources = chats(tmp_path / "chats.jsonl", [("A question of some length", "?")] * 30000)
    with pytest.raises(DataError, match=r"10240 of 10240 rows lost all supervised tokens at max_length 4"):
        DocumentStream(sources, tokenizer, max_length=4)
    with pytest.raises(DataError, match="fewer than 2 tokens"):
        DocumentStream(sources, tokenizer, max_length=1)
    with pytest.raises(DataError, match=r"none\.jsonl"):
        DocumentStream([Source(str(tmp_path / "none.jsonl"))], tokenizer, max_length=64)
