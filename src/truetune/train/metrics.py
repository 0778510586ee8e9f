"""TRL's training metrics, kept on the device and read once a log."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100
TOKEN_KINDS = ("first_token", "terminator", "rest")


class DeviceMetrics:
    """Sums of each micro-batch over all ranks, until a log asks for them.

    TRL reads three numbers from the device in every micro-batch; here nothing waits before `pop`.
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []

    def add(self, sums: torch.Tensor) -> None:
        """fp32 [5] or [6]: `FusedLossOutput.stats` (supervised tokens, sums of nll, entropy and top-1), the batch's
        tokens, and a mixture of experts' auxiliary loss."""
        self._sums.append(sums)

    def peek(self) -> dict[str, float]:
        """Sums over the micro-batches so far: supervised tokens and their negative log-likelihood."""
        if not self._sums:
            return {}
        supervised, nll = torch.stack(self._sums).double().sum(0).tolist()[:2]
        return {"supervised": supervised, "nll": nll}

    def pop(self) -> dict[str, list[float]]:
        """One value a micro-batch, under TRL's names and in its order; empties itself."""
        if not self._sums:
            return {}
        # Plain numbers: the device waits for the next step meanwhile, and PyTorch's operators on the host take longer.
        values: dict[str, list[float]] = {}
        for supervised, _, entropy, top1, num_tokens, *aux_loss in torch.stack(self._sums).tolist():
            share = 1 / supervised if supervised > 0 else 0.0
            found = {"entropy": entropy * share, "mean_token_accuracy": top1 * share, "num_tokens": num_tokens}
            if aux_loss:
                found["aux_loss"] = aux_loss[0]
            for name, value in found.items():
                values.setdefault(name, []).append(value)
        self._sums = []
        return values


def nll_by_kind(nll_K: torch.Tensor, labels_T: torch.Tensor, rows_K: torch.Tensor) -> torch.Tensor:
    """fp32 [2, 3]: sums of the negative log-likelihood, and counts, by `TOKEN_KINDS`: the first token of a supervised
    turn (also where it is the only one), its last, all others. `rows_K`: positions whose next token is supervised."""
    first_K = labels_T[rows_K] == IGNORE_INDEX
    last_K = F.pad(labels_T, (0, 2), value=IGNORE_INDEX)[rows_K + 2] == IGNORE_INDEX
    kinds_3K = torch.stack([first_K, ~first_K & last_K, ~first_K & ~last_K]).float()
    return torch.stack([kinds_3K @ nll_K.float(), kinds_3K.sum(1)])


def nll_by_source(nll_K: torch.Tensor, source_T: torch.Tensor, rows_K: torch.Tensor, sources: int) -> torch.Tensor:
    """fp32 [2, sources]: the same sums and counts, by the source of each row's document."""
    # One product, whose order of sums is always the same: index_add on a GPU has none.
    is_source_SK = (source_T[rows_K] == torch.arange(sources, device=source_T.device)[:, None]).float()
    return torch.stack([is_source_SK @ nll_K.float(), is_source_SK.sum(1)])


def source_names(sources: Sequence[str]) -> list[str]:
    """Short names for metrics, all different: a file's or Hub data set's last part without its suffix, in letters,
    digits, "_" and "-"; numbered by the order of the sources where two are alike (`chats`, `chats_2`)."""
    names: list[str] = []
    for source in sources:
        name = stem = (
            re.sub(r"[^A-Za-z0-9_-]+", "_", Path(source.rstrip("/")).name.partition(".")[0]).strip("_") or "data"
        )
        number = 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names
