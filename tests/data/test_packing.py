from collections import Counter
from pathlib import Path
from time import process_time

import numpy as np
import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st

from real_text import train_tokenizer
from truetune.data.errors import DataError
from truetune.data.packing import PackSampler, pack, pack_stream

CAPACITIES = st.integers(1, 64)


@st.composite
def lengths_and_capacity(draw):
    capacity = draw(CAPACITIES)
    return draw(st.lists(st.integers(1, capacity), max_size=80)), capacity


def shapes(packs, lengths):
    return Counter(tuple(sorted(lengths[d] for d in documents)) for documents in packs)


def fill(packs, lengths, capacity):
    return sum(lengths) / (len(packs) * capacity)


@pytest.fixture(scope="module")
def gsm8k_lengths(gsm8k_rows):
    """Tokens of the GSM8K training chats through TRL's plain Qwen2.5 template."""
    tokenizer = train_tokenizer((row["question"] + "\n" + row["answer"] for row in gsm8k_rows), vocab_size=8000)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        for row in gsm8k_rows
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


@given(lengths_and_capacity(), st.integers(0, 3), st.integers(0, 3))
def test_every_document_is_packed_once_and_no_pack_overflows(drawn, seed, epoch):
    lengths, capacity = drawn
    packs = pack(lengths, capacity, seed=seed, epoch=epoch)
    assert sorted(d for documents in packs for d in documents) == list(range(len(lengths)))
    assert all(0 < sum(lengths[d] for d in documents) <= capacity for documents in packs)


@given(lengths_and_capacity(), st.integers(0, 3), st.integers(0, 3))
def test_every_epoch_and_seed_packs_the_same_lengths_together(drawn, seed, epoch):
    lengths, capacity = drawn
    packs = pack(lengths, capacity, seed=seed, epoch=epoch)
    assert packs == pack(np.array(lengths, dtype=np.int32), capacity, seed=seed, epoch=epoch)
    assert shapes(packs, lengths) == shapes(pack(lengths, capacity), lengths)


@given(lengths_and_capacity())
def test_at_most_one_pack_is_half_empty(drawn):
    lengths, capacity = drawn
    used = [sum(lengths[d] for d in documents) for documents in pack(lengths, capacity)]
    assert sum(2 * tokens <= capacity for tokens in used) <= 1


def test_the_last_two_documents_fill_a_pack_exactly():
    lengths = [5, 4, 3, 3, 3, 2]  # the longest that fit: 5+4, 3+3+3, 2
    assert shapes(pack(lengths, 10), lengths) == {(2, 3, 5): 1, (3, 3, 4): 1}


def test_seed_and_epoch_change_who_meets_whom_and_the_order():
    lengths = [7, 3] * 50
    drawn = {(seed, epoch): pack(lengths, 10, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len({str(packs) for packs in drawn.values()}) == 4
    assert len({str(sorted(sorted(documents) for documents in packs)) for packs in drawn.values()}) == 4
    first_lengths = {lengths[documents[0]] for documents in drawn[0, 0]}
    assert first_lengths == {7, 3}


def test_packs_of_a_seed_and_epoch_never_change():
    """Resuming after an upgrade must see the same packs: this fails when the order for a seed moves."""
    assert pack([3, 3, 2, 5, 4, 1, 1], 8, seed=42, epoch=1) == [[2, 6], [3, 1], [0, 5, 4]]


def test_gsm8k_packs_are_99_percent_full(gsm8k_lengths):
    started = process_time()
    packs = pack(gsm8k_lengths, 2048)
    assert process_time() - started < 0.5  # 0.03 s on an idle core
    assert fill(packs, gsm8k_lengths, 2048) >= 0.995
    for capacity, least in ((512, 0.96), (1024, 0.99), (4096, 0.99)):
        assert fill(pack(gsm8k_lengths, capacity), gsm8k_lengths, capacity) >= least


@pytest.mark.parametrize(("count", "at_most"), [(10, 2), (100, 1), (300, 1)])
def test_few_documents_take_hardly_more_packs_than_their_tokens_need(gsm8k_lengths, count, at_most):
    lengths = gsm8k_lengths[:count]
    assert len(pack(lengths, 2048)) <= -(-sum(lengths) // 2048) + at_most - 1


def test_a_million_log_normal_documents_are_packed_full_in_seconds():
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.5, 0.8, 1_000_000).astype(int), 1, 2048)
    started = process_time()
    packs = pack(lengths, 2048)
    assert process_time() - started < 8  # 1.5 s on an idle core
    assert fill(packs, lengths, 2048) >= 0.999


def test_no_documents_give_no_packs():
    assert pack([], 8) == []
    assert list(pack_stream([], 8, 4)) == []
    assert len(PackSampler([], 8)) == 0
    assert PackSampler([], 8).efficiency == 0.0


def test_a_length_that_cannot_be_packed_is_an_error():
    with pytest.raises(DataError, match=r"document 1 has 9 tokens, but a pack holds 8"):
        pack([8, 9], 8)
    with pytest.raises(DataError, match=r"document 1 has no tokens"):
        pack([8, 0], 8)
    with pytest.raises(DataError, match=r"buffer"):
        list(pack_stream([], 8, 0))


@given(lengths_and_capacity(), st.integers(1, 10))
def test_a_stream_packs_every_document_once(drawn, buffer):
    lengths, capacity = drawn
    documents = [{"input_ids": [d] * length} for d, length in enumerate(lengths)]
    packs = list(pack_stream(iter(documents), capacity, buffer))
    assert sorted(document["input_ids"][0] for documents in packs for document in documents) == list(
        range(len(lengths))
    )
    assert all(sum(len(document["input_ids"]) for document in documents) <= capacity for documents in packs)


def test_a_stream_is_read_no_further_than_its_buffer_and_packed_full(gsm8k_lengths):
    read = 0

    def stream():
        nonlocal read
        for length in gsm8k_lengths:
            read += 1
            yield {"input_ids": range(length)}

    packs = pack_stream(stream(), 2048, 256)
    next(packs)
    assert read == 256
    assert fill([None, *packs], gsm8k_lengths, 2048) >= 0.99


def test_the_packs_of_a_stream_are_a_pure_function_of_seed_epoch_and_position(gsm8k_lengths):
    documents = [{"input_ids": range(length), "number": number} for number, length in enumerate(gsm8k_lengths[:500])]

    def numbers(capacity, **draw):
        return [[document["number"] for document in made] for made in pack_stream(documents, capacity, 64, **draw)]

    for capacity in (2048, None):
        drawn = {(seed, epoch): numbers(capacity, seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)}
        assert len({str(packs) for packs in drawn.values()}) == 4
        assert drawn[1, 1] == numbers(capacity, seed=1, epoch=1)
        assert all(sorted(d for documents in packs for d in documents) == list(range(500)) for packs in drawn.values())
    assert {len(documents) for documents in drawn[0, 0]} == {1}


def test_the_sampler_gives_the_packs_of_its_epoch():
    lengths = [5, 4, 3, 3, 3, 2]
    sampler = PackSampler(lengths, 10, seed=7)
    assert (len(sampler), sampler.efficiency) == (2, 1.0)
    assert list(sampler) == pack(lengths, 10, seed=7, epoch=0)
    sampler.set_epoch(3)
    assert list(sampler) == pack(lengths, 10, seed=7, epoch=3)
