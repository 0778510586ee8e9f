"""A few short documents of the data that a run will train on, as the checks take them."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.data.collate import collate_documents

IGNORE_INDEX = -100
Document = dict[str, list[int]]  # input_ids and labels


def documents_of(batch: Mapping[str, Any]) -> list[Document]:
    """The documents of a packed batch, or the rows of a padded one without their padding."""
    return [{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in parts_of(batch)]


def parts_of(batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each of `documents_of`, as they lie in the batch."""
    ids, labels = batch["input_ids"], batch["labels"]
    if "cu_seq_lens_q" in batch:
        ends = batch["cu_seq_lens_q"].tolist()
        return [(ids[0, a:b], labels[0, a:b]) for a, b in itertools.pairwise(ends)]
    mask = batch.get("attention_mask")
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return [(row[kept], label[kept]) for row, label, kept in zip(ids, labels, keep, strict=True)]


def excerpt(documents: Sequence[Document], tokens: int, at_least: int) -> list[Document]:
    """`at_least` documents or more of at most `tokens` in all, each with supervised tokens: cut from longer ones.

    A long document gives a window round its first supervised tokens; where there are too few documents, one gives
    several. Fewer than asked for, even none, where there is not enough supervised text.
    """
    share = tokens // at_least
    parts: list[Document] = []
    for document in documents:
        for part in _windows(document, share):
            if sum(len(each["input_ids"]) for each in parts) + len(part["input_ids"]) > tokens:
                return parts
            parts.append(part)
            if len(parts) <= at_least and len(documents) >= at_least:
                break  # one of each, as long as there are enough
    return parts


def _windows(document: Document, width: int) -> list[Document]:
    ids, labels = document["input_ids"], document["labels"]
    first = next((i for i, label in enumerate(labels) if i and label != IGNORE_INDEX), None)
    if first is None:
        return []
    windows = []
    for start in range(max(0, first - width // 2), len(ids), width):
        part = labels[start : start + width]
        part[:1] = [IGNORE_INDEX]
        if len(part) > 1 and any(label != IGNORE_INDEX for label in part):
            windows.append({"input_ids": ids[start : start + width], "labels": part})
    return windows


def packed(documents: Sequence[Document], device: torch.device) -> dict[str, Any]:
    batch = collate_documents([{name: torch.tensor(ids) for name, ids in document.items()} for document in documents])
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def num_supervised(documents: Sequence[Document]) -> int:
    return sum(label != IGNORE_INDEX for document in documents for label in document["labels"])
