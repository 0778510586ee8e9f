import json
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from truetune.data.chat import Encoder
from truetune.data.errors import DataError
from truetune.data.prepare import prepare
from truetune.data.rows import Source, read_rows


@pytest.fixture
def chats(tmp_path, gsm8k_rows):
    """A file of 60 chats; the prompts have 40 to 250 tokens, the answers 60 to 400."""
    path = tmp_path / "chats.jsonl"
    write(path, [chat(row["question"], row["answer"]) for row in gsm8k_rows[:60]])
    return [Source(str(path))]


def chat(question, *answers):
    messages = [{"role": "user", "content": question}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}]
    return {"messages": messages}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def encoded(sources, tokenizer, **settings):
    return Encoder(tokenizer, **settings).encode(read_rows(sources).rows)[0]


def supervised(labels):
    return sum(label != -100 for label in labels)


def test_documents_that_fit_are_what_the_encoder_made(chats, tokenizer, tmp_path):
    prepared = prepare(chats, tokenizer, max_length=None, cache_dir=tmp_path / "cache")
    expected = encoded(chats, tokenizer)
    assert prepared.documents["input_ids"][:] == [document.input_ids for document in expected]
    assert prepared.documents["labels"][:] == [document.labels for document in expected]
    assert prepared.documents["row"][:] == [document.row for document in expected] == list(range(60))
    assert {name: str(feature) for name, feature in prepared.documents.features.items()} == {
        "input_ids": "List(Value('int32'))",
        "labels": "List(Value('int32'))",
        "row": "Value('int32')",
        "source": "Value('int32')",
        "roles": "List(Value('uint8'))",
    }
    assert prepared.lengths.tolist() == [len(document.input_ids) for document in expected]
    counts = prepared.counts
    assert (counts.rows, counts.documents, counts.truncated, counts.dropped, counts.dropped_rows) == (60, 60, 0, {}, 0)
    assert counts.tokens == prepared.lengths.sum()
    assert counts.supervised == sum(supervised(document.labels) for document in expected)
    assert list(prepared.shapes.values()) == ["messages"]


def test_truncation_keeps_the_start_and_drops_rows_that_lost_all_supervision(chats, tokenizer, tmp_path):
    prepared = prepare(chats, tokenizer, max_length=150, cache_dir=tmp_path)
    expected = encoded(chats, tokenizer)
    left = [document for document in expected if supervised(document.labels[:150])]
    assert 0 < len(left) < 60
    assert prepared.documents["row"][:] == [document.row for document in left]
    assert prepared.documents["input_ids"][:] == [document.input_ids[:150] for document in left]
    assert prepared.documents["labels"][:] == [document.labels[:150] for document in left]
    counts = prepared.counts
    assert counts.dropped == {"supervised_tokens_cut_off": 60 - len(left)}
    assert counts.dropped_rows == 60 - len(left)
    assert counts.truncated == sum(len(document.input_ids) > 150 for document in left)
    assert counts.tokens + counts.lost_tokens == sum(len(document.input_ids) for document in left)
    assert counts.supervised + counts.lost_supervised == sum(supervised(document.labels) for document in left)
    assert counts.lost_supervised > 0


def test_splitting_trains_every_piece_and_no_piece_starts_supervised(chats, tokenizer, tmp_path):
    prepared = prepare(chats, tokenizer, max_length=64, overflow="split", cache_dir=tmp_path)
    documents = list(prepared.documents)
    expected = [
        (document.row, document.input_ids[start : start + 64], [-100, *document.labels[start + 1 : start + 64]])
        for document in encoded(chats, tokenizer)
        for start in range(0, len(document.input_ids), 64)
    ]
    expected = [piece for piece in expected if supervised(piece[2])]
    assert [(document["row"], document["input_ids"], document["labels"]) for document in documents] == expected
    counts = prepared.counts
    assert (counts.split, counts.truncated, counts.dropped_rows) == (60, 0, 0)
    total = encoded(chats, tokenizer)
    assert counts.tokens + counts.lost_tokens == sum(len(document.input_ids) for document in total)
    assert counts.supervised + counts.lost_supervised == sum(supervised(document.labels) for document in total)


def test_rows_with_nothing_supervised_are_dropped_and_counted(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    write(path, [chat("Only a question"), chat("What is 1 + 1?", "2"), chat("Again only a question")])
    prepared = prepare([Source(str(path))], tokenizer, max_length=64, cache_dir=tmp_path)
    assert prepared.documents["row"][:] == [1]
    assert prepared.counts.dropped == {"nothing_supervised": 2}
    assert (prepared.counts.rows, prepared.counts.dropped_rows) == (3, 2)


def test_an_unrolled_row_gives_several_documents_and_the_counts_say_so(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    turns = [("user", "1 + 1?"), ("assistant", "<think>a</think>2"), ("user", "2 + 2?"), ("assistant", "4")]
    write(path, [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = template
    prepared = prepare([Source(str(path))], tokenizer, max_length=64, cache_dir=tmp_path)
    assert prepared.documents["row"][:] == [0, 0]
    assert (prepared.counts.rows, prepared.counts.documents, prepared.counts.dropped_rows) == (1, 2, 0)
    assert prepared.counts.encoder == {"unrolled_conversations": 1, "unrolled_documents": 2}


def test_losing_every_row_to_truncation_is_an_error_that_says_how_long_is_enough(chats, tokenizer, tmp_path):
    documents = encoded(chats, tokenizer)
    first = min(1 + next(i for i, label in enumerate(document.labels) if label != -100) for document in documents)
    whole = max(len(document.input_ids) for document in documents)
    with pytest.raises(DataError, match=rf"60 of 60 rows lost .* max_length {first - 1}.*from {first} on.*{whole}"):
        prepare(chats, tokenizer, max_length=first - 1, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert prepare(chats, tokenizer, max_length=first, cache_dir=tmp_path).counts.documents >= 1
    assert prepare(chats, tokenizer, max_length=whole, cache_dir=tmp_path).counts.truncated == 0


def test_having_nothing_supervised_at_all_is_an_error_that_says_so(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    write(path, [chat("Only a question"), chat("Another")])
    with pytest.raises(DataError, match=r"none of the 2 rows has a token to learn from with supervise: responses"):
        prepare([Source(str(path))], tokenizer, max_length=64, cache_dir=tmp_path)
    assert prepare([Source(str(path))], tokenizer, supervise="all", max_length=64, cache_dir=tmp_path).counts.rows == 2


def test_a_max_length_that_leaves_nothing_to_predict_is_an_error(chats, tokenizer):
    with pytest.raises(DataError, match=r"max_length is 1"):
        prepare(chats, tokenizer, max_length=1)


def test_the_second_time_comes_from_the_cache_unchanged(chats, tokenizer, tmp_path):
    first = prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path)
    second = prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert second.documents.to_dict() == first.documents.to_dict()
    assert np.array_equal(second.lengths, first.lengths)
    assert second.lengths.dtype == first.lengths.dtype == np.int64
    assert (second.counts, second.shapes, second.fingerprint) == (first.counts, first.shapes, first.fingerprint)
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "chats.jsonl"] == [".arrow"]


def test_whatever_decides_the_documents_is_in_the_cache_key(chats, tokenizer, tmp_path, gsm8k_rows):
    settings = {"max_length": 300, "cache_dir": tmp_path}
    prepared = [
        prepare(chats, tokenizer, **settings),
        prepare(chats, tokenizer, **settings | {"max_length": 301}),
        prepare(chats, tokenizer, overflow="split", **settings),
        prepare(chats, tokenizer, supervise="all", **settings),
    ]
    tokenizer.add_tokens(["Natalia"])
    prepared.append(prepare(chats, tokenizer, **settings))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|> ")
    prepared.append(prepare(chats, tokenizer, **settings))
    with open(chats[0].path, "a", encoding="utf-8") as file:
        file.write(json.dumps(chat("One more", "row")) + "\n")
    prepared.append(prepare(chats, tokenizer, **settings))
    assert not any(one.from_cache for one in prepared)
    assert len({one.fingerprint for one in prepared}) == len(prepared)
    assert prepare(chats, tokenizer, **settings).from_cache


@pytest.mark.parametrize("damage", ["truncated", "emptied", "one bit flipped"])
def test_a_damaged_cache_is_made_again(chats, tokenizer, tmp_path, damage):
    first = prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path)
    expected = first.documents.to_dict()
    (path,) = tmp_path.glob("*.arrow")
    content = path.read_bytes()
    del first
    for place in np.linspace(0, len(content) - 1, 8).astype(int) if damage == "one bit flipped" else [0]:
        flipped = content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]
        path.unlink()
        path.write_bytes({"truncated": content[:-700], "emptied": b"", "one bit flipped": flipped}[damage])
        assert prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path).documents.to_dict() == expected
    assert path.read_bytes() == content


def test_several_processes_may_prepare_the_same_at_once(chats, tokenizer, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(prepare, chats, tokenizer, max_length=200, cache_dir=tmp_path) for _ in range(4)]
        prepared = [run.result() for run in runs]
    assert len({json.dumps(one.documents.to_dict()) for one in prepared}) == 1
    assert len([path for path in tmp_path.iterdir() if path.name != "chats.jsonl"]) == 1


def test_processes_make_what_one_process_makes(tmp_path, tokenizer, gsm8k_rows):
    path = tmp_path / "chats.jsonl"
    write(path, [chat(row["question"], row["answer"]) for row in gsm8k_rows[:1500]] + [chat("No answer")])
    done = []
    alone, together = (
        prepare(
            [Source(str(path))],
            tokenizer,
            max_length=150,
            num_proc=num_proc,
            cache_dir=tmp_path / str(num_proc),
            progress=lambda *rows: done.append(rows),
        )
        for num_proc in (1, 2)
    )
    assert together.documents.to_dict() == alone.documents.to_dict()
    assert together.counts == alone.counts
    assert alone.counts.dropped["nothing_supervised"] == 1
    rows = alone.documents["row"][:]
    assert rows == sorted(set(rows))
    assert tokenizer.decode(alone.documents[-1]["input_ids"]).startswith(
        f"<|im_start|>user\n{gsm8k_rows[rows[-1]]['question']}"
    )
    assert done == [(512, 1501), (1024, 1501), (1501, 1501)] * 2


def test_a_mistake_found_by_a_process_is_told_as_any_other(tmp_path, tokenizer):
    path = tmp_path / "chats.jsonl"
    write(path, [chat("1 + 1?", "2"), chat("2 + 2?", "4")])
    refusal = "{% if messages|length > 1 and '4' in messages[1].content %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    with pytest.raises(DataError, match=r"chats.jsonl:2: the chat template refuses the conversation \(no\)"):
        prepare([Source(str(path))], tokenizer, max_length=150, num_proc=2, cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_directory(chats, tokenizer, tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(DataError, match=r"cannot be cached in .*file.*HF_DATASETS_CACHE"):
        prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path / "file" / "cache")


def test_a_write_that_breaks_off_leaves_nothing_behind(chats, tokenizer, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # bytes a file
    try:
        with pytest.raises(DataError, match=r"cannot be cached in .*File too large"):
            prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not prepare(chats, tokenizer, max_length=200, cache_dir=tmp_path / "cache").from_cache


def test_rows_that_have_been_read_are_not_read_again(chats, tokenizer, tmp_path):
    rows = read_rows(chats)
    done = []
    prepared = prepare(
        [], tokenizer, max_length=200, rows=rows, cache_dir=tmp_path, progress=lambda *rows: done.append(rows)
    )
    assert prepared.counts.rows == 60
    assert prepared.shapes == rows.shapes
    assert done[-1] == (60, 60)


def test_the_counts_are_json_and_the_histogram_holds_every_document(chats, tokenizer, tmp_path):
    prepared = prepare(chats, tokenizer, max_length=None, cache_dir=tmp_path)
    counts = json.loads(json.dumps(prepared.counts.to_dict()))
    assert sum(counts["lengths"].values()) == 60
    for bounds, documents in counts["lengths"].items():
        first, last = map(int, bounds.split("-"))
        assert documents == ((first <= prepared.lengths) & (prepared.lengths <= last)).sum()
    assert len(counts["lengths"]) <= 16
