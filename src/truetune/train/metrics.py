"""TRL's training metrics, kept on the device and read once a log."""

import torch


class DeviceMetrics:
    """Sums of a micro-batch, `FusedLossOutput.stats` over all ranks, until a log asks for them.

    TRL reads three numbers from the device in every micro-batch; here nothing waits before `pop`.
    """

    def __init__(self) -> None:
        self._stats: list[torch.Tensor] = []
        self._tokens: list[torch.Tensor] = []

    def add(self, stats: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """stats fp32 [4] (supervised tokens, nll, entropy and top-1 sums) and the batch's tokens, over all ranks."""
        self._stats.append(stats)
        self._tokens.append(num_tokens)

    def peek(self) -> dict[str, float]:
        """Sums over the micro-batches so far: supervised tokens and their negative log-likelihood."""
        if not self._stats:
            return {}
        supervised, nll, _, _ = torch.stack(self._stats).double().sum(0).tolist()
        return {"supervised": supervised, "nll": nll}

    def pop(self) -> tuple[dict[str, list[float]], int]:
        """(per micro-batch means under TRL's names, tokens seen); empties itself."""
        if not self._stats:
            return {}, 0
        supervised, _, entropy, top1 = torch.stack(self._stats).double().cpu().unbind(1)
        tokens = int(torch.stack(self._tokens).sum())
        self._stats, self._tokens = [], []
        share = torch.where(supervised > 0, 1 / supervised.clamp(min=1), 0.0)
        return {"entropy": (entropy * share).tolist(), "mean_token_accuracy": (top1 * share).tolist()}, tokens
