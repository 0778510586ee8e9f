"""What is trained by source and by role, against the texts themselves."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from truetune.data import audit
from truetune.data.breakdown import breakdown
from truetune.data.chat import TEXT_ROLES, Encoder
from truetune.data.prepare import prepare
from truetune.data.rows import Row, Source, read_rows

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CHAT = [
    {"role": "system", "content": "Be brief, user."},
    {"role": "user", "content": "a"},  # also in the template's "<|im_start|>assistant"
    {"role": "assistant", "content": "s"},
    {"role": "user", "content": "What is 2 + 2? ½ 😀"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


def said(tokenizer, document, role, supervised=None):
    """The text of a role's tokens, one run of them after the other."""
    index, runs, inside = TEXT_ROLES.index(role), [], False
    for token, label, found in zip(document.input_ids, document.labels, document.roles, strict=True):
        mine = found == index and supervised in (None, label != -100)
        if mine and not inside:
            runs.append([])
        if mine:
            runs[-1].append(token)
        inside = mine
    return [tokenizer.decode(run) for run in runs]


def test_tokens_know_whose_text_they_are(tokenizer):
    (document,), _ = Encoder(tokenizer, chat_template="chatml").encode([Row(CHAT)])
    prompts = said(tokenizer, document, "prompt", supervised=False)
    for prompt, text in zip(prompts, ("user\na<|im_end|>", "2 + 2? ½ 😀<|im_end|>", "4<|im_end|>"), strict=True):
        assert text in prompt and prompt.endswith("assistant\n")
    first, second, third = said(tokenizer, document, "assistant")
    assert (first, third) == ("s<|im_end|>", "It is 4.<|im_end|>") and '"add"' in second
    assert said(tokenizer, document, "assistant", supervised=False) == []
    assert "".join(said(tokenizer, document, "template", supervised=True)) == ""


def test_an_answer_that_is_not_trained_is_prompt(tokenizer):
    (document,), _ = Encoder(tokenizer, chat_template="chatml", supervise="last_response").encode(
        [Row(CHAT[:4] + CHAT[6:])]
    )
    assert said(tokenizer, document, "assistant", supervised=False) == []
    assert said(tokenizer, document, "assistant", supervised=True) == ["It is 4.<|im_end|>"]
    (prompt,) = said(tokenizer, document, "prompt")
    assert "s<|im_end|>" in prompt


def test_everything_supervised_is_told_by_role_too(tokenizer):
    (document,), _ = Encoder(tokenizer, chat_template="chatml", supervise="all").encode([Row(CHAT[3:4] + CHAT[6:])])
    assert said(tokenizer, document, "user", supervised=True) == ["What is 2 + 2? ½ 😀"]
    assert said(tokenizer, document, "assistant", supervised=True) == ["It is 4."]


@pytest.mark.parametrize("in_pieces", [True, False])
def test_text_without_roles(tokenizer, in_pieces):
    encoder = Encoder(tokenizer)
    encoder._in_pieces = in_pieces
    documents, _ = encoder.encode([Row(prompt="One two.", completion=" Three."), Row(completion="Four.")])
    assert said(tokenizer, documents[0], "prompt") == ["One two."]
    assert said(tokenizer, documents[0], "completion")[0].startswith(" Three.")
    assert said(tokenizer, documents[1], "text")[0].startswith("Four.")


def test_tokenizing_whole_tells_the_same_roles(tokenizer):
    pieces, whole = (Encoder(tokenizer, chat_template="chatml") for _ in range(2))
    whole._in_pieces = False
    rows = [Row(CHAT), Row(prompt="One two.", completion=" Three.")]
    for supervise in ("responses", "all"):
        pieces.supervise = whole.supervise = supervise
        for one, other in zip(pieces.encode(rows)[0], whole.encode(rows)[0], strict=True):
            assert (one.input_ids, one.labels, one.roles) == (other.input_ids, other.labels, other.roles)


@pytest.fixture
def sources(tmp_path, gsm8k_rows):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(str(path))

    chats = [{"user": row["question"], "assistant": row["answer"], "system": "Be brief."} for row in gsm8k_rows[:20]]
    texts = [{"text": row["question"]} for row in gsm8k_rows[20:27]]
    silent = [{"messages": [{"role": "user", "content": "Nothing to learn here"}]}]
    return [write("chats.jsonl", chats), write("texts.jsonl", texts), write("silent.jsonl", silent)]


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_sources_are_counted_as_each_alone(sources, tokenizer, tmp_path, overflow):
    settings = {"max_length": 96, "overflow": overflow, "cache_dir": tmp_path / "cache"}
    together = prepare(sources, tokenizer, **settings)
    found = breakdown(together.documents, list(together.shapes))
    assert list(found["sources"]) == [source.path for source in sources]
    for source in sources[:2]:
        alone = prepare([source], tokenizer, **settings)
        counted = found["sources"][source.path]
        assert counted["rows"] == alone.counts.rows - alone.counts.dropped_rows
        assert (counted["tokens"], counted["supervised"]) == (alone.counts.tokens, alone.counts.supervised)
        assert counted["share"] == pytest.approx(alone.counts.supervised / alone.counts.tokens, abs=1e-6)
    assert found["sources"][sources[2].path] == {"rows": 0, "tokens": 0, "supervised": 0, "share": 0.0}
    roles = found["roles"]
    assert sum(of["tokens"] for of in roles.values()) == together.counts.tokens
    assert sum(of["supervised"] for of in roles.values()) == together.counts.supervised
    assert roles["prompt"]["supervised"] == 0
    assert roles["assistant"]["share"] == 1.0 or overflow == "split"  # whose pieces begin unsupervised
    assert roles["text"]["share"] > 0.9
    assert roles["text"]["rows"] == 7
    assert roles["assistant"]["rows"] == found["sources"][sources[0].path]["rows"]


def test_the_same_rows_of_other_sources_are_other_rows(tmp_path):
    lines = [json.dumps({"text": text}) + "\n" for text in "abcd"]
    for name, part in (("one", lines), ("first", lines[:2]), ("second", lines[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    one, two = (
        read_rows([Source(str(tmp_path / f"{name}.jsonl")) for name in names])
        for names in (["one"], ["first", "second"])
    )
    assert [row.source for row in two.rows] == [0, 0, 1, 1]
    assert one.fingerprint != two.fingerprint  # or one would be given the other's cached documents


def test_inspect_shows_both(sources, tokenizer, tmp_path):
    prepared = prepare(sources, tokenizer, max_length=256, cache_dir=tmp_path / "cache")
    summary = audit.summary(prepared)
    assert summary["roles"].keys() == {"template", "assistant", "prompt", "text"}
    console = Console(file=io.StringIO(), width=200)
    console.print(audit.render_summary(summary))
    printed = console.file.getvalue()
    assert f"source: {sources[0].path}" in printed and "role: assistant" in printed
    assert f"{summary['sources'][sources[1].path]['rows']:,} rows" in printed


def test_what_was_cut_off_with_its_rows_is_counted(sources, tokenizer, tmp_path):
    whole = prepare(sources[:1], tokenizer, max_length=None, cache_dir=tmp_path / "cache").counts
    cut = prepare(sources[:1], tokenizer, max_length=64, cache_dir=tmp_path / "cache").counts
    assert cut.dropped["supervised_tokens_cut_off"] > 0
    assert cut.supervised + cut.lost_supervised + cut.cut_off_supervised == whole.supervised


def test_roles_are_one_byte_a_token(sources, tokenizer, tmp_path):
    documents = prepare(sources, tokenizer, max_length=64, cache_dir=tmp_path / "cache").documents
    assert all(len(row["roles"]) == len(row["input_ids"]) for row in documents)
    assert np.max([max(row["roles"]) for row in documents]) < len(TEXT_ROLES)
