import json
import subprocess
import sys
import time

import pytest
from source_files import CHAT, error_of, write_jsonl

from truetune.data.errors import DataError
from truetune.data.rows import Source, read_rows, stream_rows


def test_reading_gsm8k_costs_little_more_than_parsing_its_json(gsm8k_path):
    source = Source(str(gsm8k_path), columns={"user": "question", "assistant": "answer"})
    parsing, reading = [], []
    for _ in range(5):
        start = time.process_time()
        parsed = [json.loads(line) for line in gsm8k_path.read_bytes().splitlines()]
        parsing.append(time.process_time() - start)
        rows = read_rows([source]).rows
        reading.append(time.process_time() - start - parsing[-1])
        assert len(rows) == len(parsed)
    assert min(reading) < 5 * min(parsing)  # 2.6 times, 85 ms, when written


def test_a_directory_is_its_data_files_by_name(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "c.json").write_text('[{"text": "c"}]')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "nested").mkdir()
    write_jsonl(tmp_path / "nested" / "d.jsonl", [{"text": "d"}])
    write_jsonl(tmp_path / ".hidden.jsonl", [{"text": "hidden"}])
    for path, expected in ((tmp_path, "abc"), (tmp_path / "*.js*", "bc"), (tmp_path / "**" / "*.jsonl", "bd")):
        result = read_rows([Source(str(path))])
        assert "".join(row.completion for row in result.rows) == expected
        assert result.shapes == {str(path): "text"}


def test_a_saved_dataset_has_splits(tmp_path):
    import datasets

    data = {split: datasets.Dataset.from_list([{"messages": CHAT, "id": split}] * 2) for split in ("train", "test")}
    datasets.DatasetDict(data).save_to_disk(str(tmp_path / "both"))
    data["train"].save_to_disk(str(tmp_path / "one"))
    result = read_rows([Source(str(tmp_path / "both"), split="test"), Source(str(tmp_path / "one"))])
    assert [row.messages for row in result.rows] == [CHAT] * 4
    assert result.rows[1].origin == f"{tmp_path}/both:2"
    assert "no split dev: its splits are train, test" in error_of(Source(str(tmp_path / "both"), split="dev"))
    assert "no split test: its splits are train" in error_of(Source(str(tmp_path / "one"), split="test"))


def test_a_stream_is_read_as_it_goes(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 1}])
    stream = stream_rows([Source(str(path))])
    assert stream.shapes == {str(path): "text"}
    rows = stream.rows
    assert next(rows).completion == "a"
    with pytest.raises(DataError, match=r"a\.jsonl:2: `text` is a number"):
        next(rows)


def test_reading_needs_neither_torch_nor_transformers_nor_datasets(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    code = (
        "import sys; from truetune.data.rows import Source, read_rows; read_rows([Source(sys.argv[1])]);"
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def counted(tmp_path, **counts):
    return {
        name: str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)]))
        for name, n in counts.items()
    }


def test_equal_weights_take_every_row_in_order(tmp_path):
    paths = counted(tmp_path, a=3, b=5)
    result = read_rows([Source(paths["b"], weight=2), Source(paths["a"], weight=2)])
    assert [row.completion for row in result.rows] == ["b0", "b1", "b2", "b3", "b4", "a0", "a1", "a2"]
    assert result.sampled == {paths["b"]: (5, 5), paths["a"]: (3, 3)}


def test_weights_are_shares_of_rows_and_repeat_nothing(tmp_path):
    paths = counted(tmp_path, a=100, b=1000, c=60)
    result = read_rows([Source(paths["a"], weight=0.5), Source(paths["b"], weight=0.3), Source(paths["c"], weight=0.2)])
    assert result.sampled == {paths["a"]: (100, 100), paths["b"]: (60, 1000), paths["c"]: (40, 60)}
    texts = [row.completion for row in result.rows]
    assert len(set(texts)) == len(texts) == 200
    drawn = [int(text[1:]) for text in texts[100:160]]
    assert drawn == sorted(drawn)
    assert max(drawn) > 500  # drawn from all of the file, not its head


def test_the_seed_decides_the_sample(tmp_path):
    paths = counted(tmp_path, a=100, b=1000)
    sources = [Source(paths["a"], weight=2), Source(paths["b"], weight=1)]
    first, again, other = (read_rows(sources, seed=seed) for seed in (1, 1, 2))
    assert first.rows == again.rows
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_a_stream_takes_from_its_sources_in_turn_by_weight(tmp_path):
    paths = counted(tmp_path, a=100, b=1000, c=60)
    sources = [Source(paths["a"], weight=0.5), Source(paths["b"], weight=0.3), Source(paths["c"], weight=0.2)]
    names = [row.completion[0] for row in stream_rows(sources).rows]
    assert {name: names.count(name) for name in "abc"} == {"a": 100, "b": 60, "c": 40}
    for start in range(0, 200, 10):
        assert [names[start : start + 10].count(name) for name in "abc"] == [5, 3, 2]
    equal = [row.completion for row in stream_rows([Source(paths["c"]), Source(paths["a"])]).rows]
    assert equal[:4] == ["c0", "a0", "c1", "a1"] and equal[-1] == "a99" and len(set(equal)) == 160


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    """Datasets' own streaming, of a file in the Hub's place, for tests have no network."""
    import datasets

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    load_dataset = datasets.load_dataset

    def load_file(name, configuration, *, split, revision, streaming):
        assert (name, configuration, split, revision) == ("owner/name", "en", "test", "v1")
        return load_dataset("json", data_files={"test": str(path)}, split="test", streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_file)
    source = Source("owner/name", split="test", revision="v1", name="en")
    rows = stream_rows([source]).rows
    assert [(row.completion, row.origin) for row in rows] == [("a", "owner/name:1"), ("b", "owner/name:2")]
    path.write_text('{"text": "a"}\n' * 2000 + '{"text": \n')
    with pytest.raises(DataError, match=r"owner/name cannot be read on from the Hub: .*JSON"):
        list(stream_rows([source]).rows)


def test_the_same_file_twice_is_two_sources(tmp_path):
    path = str(write_jsonl(tmp_path / "qa.jsonl", [{"question": "q", "answer": "a"}]))
    result = read_rows(
        [
            Source(path, columns={"prompt": "question", "completion": "answer"}),
            Source(path, columns={"user": "answer", "assistant": "question"}),
        ]
    )
    assert result.shapes == {path: "prompt + completion", f"{path} (2)": "user + assistant"}


def test_the_fingerprint_follows_the_content_not_the_place(tmp_path):
    rows = [{"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}, {"messages": CHAT}]
    variants = [rows, rows[::-1], rows[:1], [rows[0] | {"tools": [{"name": "f"}]}, rows[1]]]
    variants.append([{"messages": CHAT}, {"messages": CHAT}])
    variants.append([{"prompt": CHAT[:1], "completion": CHAT[1:]}] * 2)
    hashes = []
    for number, variant in enumerate(variants):
        path = write_jsonl(tmp_path / f"{number}.jsonl", variant)
        hashes.append(read_rows([Source(str(path))]).fingerprint)
    assert len(set(hashes)) == len(variants)
    moved = write_jsonl(tmp_path / "moved.jsonl", rows)
    assert read_rows([Source(str(moved))]).fingerprint == hashes[0]


def test_dates_in_messages_have_a_fingerprint_too(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    hashes = []
    for day in (1, 1, 2):
        rows = [{"messages": [CHAT[0], CHAT[1] | {"time": datetime.datetime(2024, 1, day)}]}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        hashes.append(read_rows([Source(str(tmp_path / "a.parquet"))]).fingerprint)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "chats.jsonl", [{"text": "a"}])
    assert f"there is no file or directory {tmp_path}/chat.jsonl (did you mean {tmp_path}/chats.jsonl?)" == error_of(
        tmp_path / "chat.jsonl"
    )
    assert f"nor a directory {tmp_path}/nowhere" in error_of(tmp_path / "nowhere" / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    assert error_of("chat.jsonl") == "there is no file or directory chat.jsonl (did you mean chats.jsonl?)"
    assert error_of("*.csv") == "no file matches *.csv that can be read: .jsonl, .json, .csv, .parquet"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("a")
    assert error_of("docs") == "no file in docs that can be read: .jsonl, .json, .csv, .parquet"
    assert "builtin:nothing" in error_of("builtin:nothing")
    assert "the path of the data is empty" in error_of("")
    with pytest.raises(DataError, match="no data was given"):
        read_rows([])


def test_an_unreachable_hub_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    message = error_of("openai/gsm8k")
    assert message.startswith(
        "openai/gsm8k is no file or directory, nor a directory openai, and it cannot be loaded as a Hub"
    )
    assert message.endswith("go online or name a file")
    assert "(did you mean gsm8k?)" in error_of("gsm8")


def test_files_have_no_splits_revisions_or_names(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]))
    assert "has the split train alone, not test: name the file" in error_of(Source(path, split="test"))
    assert "is no Hub data set and has no revision main" in error_of(Source(path, revision="main"))
    assert "is no Hub data set and has no name en" in error_of(Source(path, name="en"))


@pytest.mark.parametrize("other", ["test-00000-of-00001.jsonl", "chats_val.jsonl"])
@pytest.mark.parametrize("train", ["train-00000-of-00001.jsonl", "chats.jsonl"])
def test_a_directory_of_several_splits_is_not_trained_on_whole(tmp_path, train, other):
    for name in (train, other):
        write_jsonl(tmp_path / name, [{"text": name}])
    assert f"holds files of several splits ({', '.join(sorted((train, other)))}): name the file" in error_of(tmp_path)
    assert len(read_rows([Source(str(tmp_path / "*.jsonl"))]).rows) == 2


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_are_above_zero(tmp_path, weight):
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]))
    assert f"the weight of {path} is {weight}: give a number above 0" == error_of(Source(path, weight=weight))


def test_a_weight_that_takes_no_row_is_named(tmp_path):
    paths = counted(tmp_path, a=10, b=10)
    message = error_of(Source(paths["a"]), Source(paths["b"], weight=0.001))
    assert f"the weight of {paths['b']} is so small that none of its rows is taken" in message
