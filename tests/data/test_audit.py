import io
import json
import subprocess
import sys

import pytest
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from truetune.data import audit
from truetune.data.packing import pack
from truetune.data.prepare import prepare
from truetune.data.rows import Source

CHATS = [
    [
        ("user", "What is 2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "And 3 + 3? ½ [bold]x[/bold]"),
        ("assistant", "6 😀"),
    ],
    [("user", "Nothing to learn here")],
    [("system", "Be brief."), ("user", "How many?"), ("assistant", "Seven\nof them.")],
]


@pytest.fixture
def sources(tmp_path):
    path = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [Source(str(path))]


def lines(prepared, tokenizer, **settings):
    return [json.loads(json.dumps(line)) for line in audit.inspect_lines(prepared, tokenizer, **settings)]


def test_each_line_shows_a_document_as_it_is_trained(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, max_length=256, cache_dir=tmp_path)
    first, second, _ = lines(prepared, tokenizer)
    assert list(first) == ["row", "input_ids", "labels", "text", "supervised"]
    assert first["row"] == 0
    assert first["text"] == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in CHATS[0])
    assert first["supervised"] == ["It is 4.<|im_end|>", "6 😀<|im_end|>"]
    assert (first["input_ids"], first["labels"]) == (
        prepared.documents[0]["input_ids"],
        prepared.documents[0]["labels"],
    )
    assert (second["row"], second["supervised"]) == (2, ["Seven\nof them.<|im_end|>"])


def test_a_truncated_document_is_shown_as_it_is_trained(sources, tokenizer, tmp_path):
    whole = prepare(sources, tokenizer, max_length=None, cache_dir=tmp_path).documents[0]
    length = 2 + next(i for i, label in enumerate(whole["labels"]) if label != -100)
    first, *_, last = lines(prepare(sources, tokenizer, max_length=length, cache_dir=tmp_path), tokenizer)
    assert first["input_ids"] == whole["input_ids"][:length]
    assert first["supervised"] == [tokenizer.decode(whole["labels"][length - 2 : length])]
    assert last["summary"]["truncated"] >= 1


def test_the_summary_counts_all_rows_however_many_are_shown(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, max_length=64, cache_dir=tmp_path)
    shown = lines(prepared, tokenizer, rows=1, packing=64)
    assert [line.get("row") for line in shown] == [0, None]
    summary = shown[-1]["summary"]
    assert (summary["rows"], summary["documents"], summary["dropped_rows"]) == (3, 2, 1)
    assert summary["dropped"] == {"nothing_supervised": 1}
    assert summary["tokens"] == sum(len(ids) for ids in prepared.documents["input_ids"])
    assert summary["supervised"] == sum(label != -100 for labels in prepared.documents["labels"] for label in labels)
    assert sum(summary["lengths"].values()) == 2
    assert summary["packs"] == len(pack(prepared.lengths, 64))
    assert summary["packing_efficiency"] == pytest.approx(summary["tokens"] / (64 * summary["packs"]), abs=1e-6)
    assert list(summary["shapes"].values()) == ["messages"]
    assert "packs" not in lines(prepared, tokenizer)[-1]["summary"]


def test_rows_are_counted_by_rows_not_by_their_documents(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, max_length=20, overflow="split", cache_dir=tmp_path)
    shown = lines(prepared, tokenizer, rows=1)[:-1]
    assert len(shown) > 1
    assert {line["row"] for line in shown} == {0}


def test_a_span_keeps_the_space_that_sentencepiece_puts_before_a_word():
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "▁", "a", "b", "▁b"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ids = tokenizer.encode("<s>a b</s>", add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "a", "▁b", "</s>"]
    assert audit.supervised_spans(tokenizer, ids, [-100, -100, *ids[2:]]) == [" b</s>"]


def test_supervised_tokens_are_coloured_and_the_others_dim(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, max_length=256, cache_dir=tmp_path)
    document = prepared.documents[0]
    text = audit.render_document(tokenizer, document)
    assert text.plain == tokenizer.decode(document["input_ids"])
    by_style = {}
    for span in text.spans:
        by_style.setdefault(span.style, []).append(text.plain[span.start : span.end])
    assert by_style[audit.STYLES[True, False]] == ["It is 4.", "6 😀"]
    assert by_style[audit.STYLES[True, True]] == ["<|im_end|>"] * 2
    assert set(by_style[audit.STYLES[False, True]]) == {"<|im_start|>", "<|im_end|>"}
    assert "user\nWhat is 2 + 2?" in by_style[audit.STYLES[False, False]]


def test_the_summary_is_printed_with_every_count(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, max_length=64, cache_dir=tmp_path)
    console = Console(file=io.StringIO(), width=100)
    console.print(audit.render_summary(audit.summary(prepared, packing=64)))
    printed = console.file.getvalue()
    for words in ("rows", "supervised", "truncated", "dropped: nothing supervised", "packing efficiency", "messages"):
        assert words in printed


def test_looking_at_data_loads_no_model_code():
    code = "import sys, truetune.data.audit; sys.exit(', '.join({'trl', 'peft'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
