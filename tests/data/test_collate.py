import pickle

import numpy as np
import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from truetune.data.collate import UnpaddingCollator, collate_documents, loss_rows, unpad, why_padded


def padded(lengths, side="right", seed=0, width=None):
    """A batch as a padding collator makes it: random ids, every real token supervised."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, columns] = torch.randint(1, 100, (length,), generator=generator)
        mask[row, columns] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def test_documents_are_laid_back_to_back_and_their_first_token_is_no_target():
    batch = collate_documents(
        [{"input_ids": [5, 6, 7], "labels": [5, -100, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert batch["loss_rows"].tolist() == [1, 3]
    assert batch["loss_rows"].dtype == torch.int64


def test_lists_tensors_and_arrays_that_cannot_be_written_to_give_the_same_batch(recwarn):
    lists = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9], "labels": [-100, 9]}]
    expected = collate_documents(lists)
    frozen = [{key: np.array(values) for key, values in document.items()} for document in lists]
    for document in frozen:
        for array in document.values():
            array.flags.writeable = False
    tensors = [{key: torch.tensor(values, dtype=torch.int32) for key, values in document.items()} for document in lists]
    for documents in (frozen, tensors):
        batch = collate_documents(documents)
        batch["input_ids"].add_(0)  # memory of its own
        for key in ("input_ids", "labels"):
            assert batch[key].dtype == torch.int64 and torch.equal(batch[key], expected[key])
    assert not recwarn.list


def test_no_documents_give_a_batch_that_adds_nothing():
    batch = collate_documents([])
    assert batch["input_ids"].shape == (1, 2)
    assert batch["loss_rows"].numel() == 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_unpadding_keeps_tokens_in_order_and_the_positions_the_model_would_have_used(side):
    lengths = [3, 5, 1]
    batch = padded(lengths, side)
    out = unpad(batch)
    assert "attention_mask" not in out
    assert out["input_ids"][0].tolist() == batch["input_ids"][batch["attention_mask"].bool()].tolist()
    assert out["cu_seq_lens_q"].tolist() == [0, 3, 8, 9]
    start = [0, 0, 0] if side == "right" else [2, 0, 4]
    assert out["position_ids"][0].tolist() == [s + i for s, n in zip(start, lengths, strict=True) for i in range(n)]


def test_unpadding_keeps_the_number_of_targets():
    batch = padded([4, 7, 2, 1])
    batch["labels"][1, 2] = -100
    out = unpad(batch)
    targets = batch["labels"][:, 1:]
    assert out["loss_rows"].numel() == int((targets != -100).sum())
    assert int((out["labels"][..., 1:] != -100).sum()) == int((targets != -100).sum())
    assert out["labels"][0, out["loss_rows"] + 1].tolist() == targets[targets != -100].tolist()


def test_given_positions_are_kept():
    batch = padded([3, 2])
    batch["position_ids"] = torch.tensor([[7, 8, 9], [4, 5, 0]])
    assert unpad(batch)["position_ids"].tolist() == [[7, 8, 9, 4, 5]]


def test_empty_rows_make_no_document():
    assert unpad(padded([3, 0, 2], width=4))["cu_seq_lens_q"].tolist() == [0, 3, 5]


def test_a_packed_batch_only_gains_its_loss_rows():
    packed = collate_documents([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    rows = packed.pop("loss_rows")
    out = unpad(packed)
    assert out.pop("loss_rows").tolist() == rows.tolist()
    assert out.keys() == packed.keys() and all(out[key] is packed[key] for key in packed)


def test_documents_that_only_positions_keep_apart_get_their_boundaries():
    """TRL 1.15's padding-free batches, padding to a multiple included: each pad is a document of one token."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0]])
    ids = torch.arange(7)[None] + 1
    out = unpad({"input_ids": ids, "labels": ids.clone(), "position_ids": positions})
    assert out["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 7]
    assert out["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100]]
    assert out["position_ids"].tolist() == positions.tolist()


def with_(**changes):
    return {**padded([3, 2]), **changes}


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (with_(pixel_values=torch.zeros(2, 3, 4, 4)), "pixel_values"),
        (with_(token_type_ids=torch.zeros(2, 3)), "token_type_ids"),
        (with_(weights=torch.zeros(2, 3)), "weights"),
        (with_(position_ids=torch.zeros(3, 2, 3)), "position_ids"),
        (with_(attention_mask=torch.zeros(2, 1, 3, 3)), "attention_mask"),
        (with_(attention_mask=torch.tensor([[1, 0, 1], [1, 1, 0]])), "one run of ones"),
        (with_(attention_mask=torch.tensor([[1, 1, 2], [1, 1, 0]])), "one run of ones"),
        (with_(labels=torch.ones(2, 3, dtype=torch.int64)), "labels stand on padding"),
        (with_(labels=torch.ones(2, 2, dtype=torch.int64)), "labels"),
        ({"inputs_embeds": torch.zeros(2, 3, 8)}, "input_ids"),
        ({**with_(position_ids=torch.zeros(2, 3)), "attention_mask": None}, "without attention_mask"),
    ],
)
def test_what_unpadding_would_change_passes_through(batch, reason):
    assert reason in why_padded(batch)
    out = unpad(batch)
    assert out.keys() == batch.keys() and all(out[key] is batch[key] for key in batch)


def test_other_entries_go_along_and_the_collator_travels_to_workers():
    collator = pickle.loads(pickle.dumps(UnpaddingCollator(add_source)))
    out = collator([3, 2])
    assert type(out) is dict and out["source"] == "chats" and "cu_seq_lens_q" in out


def add_source(lengths):
    return {**padded(lengths), "source": "chats"}


@pytest.mark.parametrize("packed", [False, True])
def test_rows_become_the_same_batch_by_way_of_arrays(packed):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}, {"input_ids": [9, 10, 11], "labels": [-100] * 3}]
    if packed:
        rows = [row | {"seq_lengths": [2, len(row["input_ids"]) - 2]} for row in rows]
    collate = DataCollatorForLanguageModeling(0, return_position_ids=packed)
    expected, found = (UnpaddingCollator(collate, reads_lists)(rows) for reads_lists in (False, True))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if torch.is_tensor(value):
            assert torch.equal(value, found[name]) and value.dtype == found[name].dtype
        else:
            assert value == found[name]
    odd = [{"input_ids": [True, False], "labels": [1.0, 2.0]}]
    seen = []
    UnpaddingCollator(lambda features: seen.extend(features) or padded([2]), True)(odd)
    assert seen == odd  # what torch.tensor would read otherwise stays a list


def test_loss_rows_never_reach_into_the_next_row():
    labels = torch.tensor([[-100, 1, -100], [2, 3, 4]])
    assert loss_rows(labels).tolist() == [0, 3, 4]
