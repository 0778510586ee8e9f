"""TRL 1.15's fused head on a CPU, in plain PyTorch.

1.15 launches its Triton kernels on a CPU too and has nothing else: the interpreter takes minutes for a training curve
of twenty steps, and without it or without Triton stock TRL fails. 1.16 folds its tiles in PyTorch there by itself, so
this goes when 1.15 does. `test_stock_trl.py` holds it against TRL's kernels.
"""

import trl.trainer.utils
from torch import Tensor, nn
from trl.kernels import ChunkedLogProbFunction


class PlainOnCpu:
    """Stands for `ChunkedLogProbFunction`; tensors on a GPU go to TRL's kernels as before."""

    @staticmethod
    def apply(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, *settings):
        if hidden_NH.device.type != "cpu":
            return ChunkedLogProbFunction.apply(hidden_NH, weight_VH, bias_V, targets_N, *settings)
        return log_probs_entropy_top1(hidden_NH, weight_VH, bias_V, targets_N, *settings)


def log_probs_entropy_top1(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor, Tensor, None, None, Tensor]:
    assert set(outputs) == {"log_probs", "entropy", "is_top1"}  # what SFTTrainer asks for
    logits_NV = nn.functional.linear(hidden_NH, weight_VH, bias_V).float() * logit_scale
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    log_p_NV = (logits_NV / temperature).log_softmax(-1)
    log_probs_N = log_p_NV.gather(-1, targets_N[:, None])[:, 0]
    entropy_N = -(log_p_NV.exp() * log_p_NV).sum(-1)
    return log_probs_N, entropy_N, None, None, logits_NV.argmax(-1) == targets_N


def use_plain_head_on_cpu() -> None:
    trl.trainer.utils._ChunkedLogProbFunction = PlainOnCpu
