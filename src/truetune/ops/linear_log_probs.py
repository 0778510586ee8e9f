"""Log-probabilities of labels from hidden states and the LM head, never holding the full logits.

Letters of tensor shapes: N positions (the flattened leading dimensions), K kept rows, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from truetune.ops.linear_cross_entropy import (
    check_inputs,
    finish_gradients,
    linear_cross_entropy_op,
    precise,
    reference_logits,
    remember_inputs,
)

# The kernels and their launchers are those of `linear_cross_entropy`.


@torch.library.custom_op("truetune::linear_log_probs", mutates_args=())
def _linear_log_probs_op(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, rows_K: Tensor, dtype: torch.dtype,
    logit_scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    inputs = (hidden_NH, weight_VH, bias_V, labels_N, rows_K, None, None, dtype, logit_scale, softcap)
    return -linear_cross_entropy_op(*inputs, 0.0, False, False, False, False, False)[1]


@_linear_log_probs_op.register_fake
def _(hidden_NH, weight_VH, bias_V, labels_N, rows_K, dtype, logit_scale, softcap):
    return hidden_NH.new_empty(rows_K.shape, dtype=precise(dtype))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden_NH, weight_VH, bias_V, labels_N, rows_K, *ctx.settings = inputs
    dtype, logit_scale, _ = ctx.settings
    remember_inputs(ctx, hidden_NH, weight_VH, bias_V, dtype, logit_scale)
    ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, rows_K)


def _backward(ctx: Any, grad_K: Tensor):
    # Rows are weighted relative to the largest gradient: products with small ones would vanish in half precision.
    largest = grad_K.abs().amax().clamp(min=torch.finfo(grad_K.dtype).tiny) if len(grad_K) else grad_K.sum()
    *inputs, rows_K = ctx.saved_tensors
    settings = (*ctx.settings, 0.0, False, False, *ctx.needs_input_grad[:3])
    results = linear_cross_entropy_op(*inputs, rows_K, -grad_K / largest, None, *settings)
    return *finish_gradients(ctx, largest, None, rows_K, *results[4:]), *[None] * 5


_linear_log_probs_op.register_autograd(_backward, setup_context=_setup_context)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, rows: Tensor | None = None,
    softcap: float | None = None, logit_scale: float = 1.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """Log-probabilities of the kept rows' labels, [K] fp32, for losses that weight each token in their own way.

    Arguments and errors are those of `linear_cross_entropy`. The gradient of a row may be anything, so gradients are
    made in the backward pass, which computes the logits of each chunk again.
    """
    *inputs, dtype = check_inputs(hidden, weight, bias, labels, rows, logit_scale, ignore_index)
    return _linear_log_probs_op(*inputs, dtype, logit_scale, softcap)


def linear_log_probs_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, rows: Tensor | None = None,
    softcap: float | None = None, logit_scale: float = 1.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """`linear_log_probs` as PyTorch would do it, with the full logits."""
    targets_K, logits_KV = reference_logits(hidden, weight, labels, bias, rows, softcap, logit_scale, ignore_index)
    return logits_KV.log_softmax(-1).gather(1, targets_K[:, None]).squeeze(1)
