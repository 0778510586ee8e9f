"""Rows, tokens and supervised tokens of prepared documents, by source and by role."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from truetune.data.chat import IGNORE_INDEX, TEXT_ROLES

Shares = dict[str, dict[str, float]]  # name -> rows, tokens, supervised, share (of its tokens)


def breakdown(documents: datasets.Dataset, sources: Sequence[str]) -> dict[str, Shares]:
    """{"sources": of all `sources` by their names, "roles": of the roles that were met, in the order of `TEXT_ROLES`}.

    rows: those that have such tokens; a row whose documents were all dropped is none. Empty for documents that say
    neither, which are not of `prepare`'s making.
    """
    if not {"row", "source", "roles"} <= set(documents.column_names):
        return {}
    table = documents.with_format("arrow").select_columns(["labels", "row", "source", "roles"])[:]
    supervised_N = _flat(table["labels"]) != IGNORE_INDEX
    role_N = _flat(table["roles"])
    lengths_D = np.concatenate([chunk.value_lengths().to_numpy() for chunk in table["labels"].chunks])
    row_D, source_D = (table[name].to_numpy() for name in ("row", "source"))
    source_N = np.repeat(source_D.astype(np.uint16), lengths_D)
    _, row_D = np.unique(row_D, return_inverse=True)
    row_N = np.repeat(row_D.astype(np.uint32), lengths_D)
    return {
        "sources": _shares(sources, source_N, row_N, supervised_N),
        "roles": {
            name: found for name, found in _shares(TEXT_ROLES, role_N, row_N, supervised_N).items() if found["tokens"]
        },
    }


def in_words(shares: Mapping[str, Any]) -> str:
    return (
        f"{shares['rows']:,} rows, {shares['tokens']:,} tokens, {shares['supervised']:,} supervised "
        f"({shares['share']:.1%})"
    )


def _shares(names: Sequence[str], kind_N: np.ndarray, row_N: np.ndarray, supervised_N: np.ndarray) -> Shares:
    tokens = np.bincount(kind_N, minlength=len(names)).tolist()
    supervised = np.bincount(kind_N[supervised_N], minlength=len(names)).tolist()
    met = np.zeros((int(row_N.max(initial=0)) + 1, len(tokens)), bool)
    met[row_N, kind_N] = True
    counted = zip(names, met.sum(0).tolist(), tokens, supervised, strict=True)
    return {
        name: {"rows": rows, "tokens": of, "supervised": part, "share": round(part / max(1, of), 6)}
        for name, rows, of, part in counted
    }


def _flat(column: pa.ChunkedArray) -> Any:
    return np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
