"""The LM head and its loss in one operation that never holds the full logits.

The kept rows go through the head in chunks of about 4,096: one GEMM makes a chunk's logits, one kernel turns them into
their gradient in place (`cross_entropy.py`), and one or two more GEMMs turn that into the gradients of the hidden
states and of the head. All of it happens in the forward pass, so nothing is recomputed; the backward pass only scales.
A frozen head in bf16 on Hopper holds no logits at all (`frozen_head.py`).

Letters of tensor shapes: N positions (the flattened leading dimensions), K kept rows, C rows of one chunk, H hidden
size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.ops import frozen_head
from truetune.ops.backend import use_kernels
from truetune.ops.cross_entropy import (
    Loss,
    Rows,
    accumulate_product,
    cross_entropy_chunk,
    cross_entropy_chunk_torch,
    final_logits,
    gradient_scale,
    precise,
)
from truetune.ops.rows import scale_rows

# ----------------------------------------------------------------------------------------------------------------------
# The op


def _chunk_rows(num_rows: int, bytes_per_row: int, kernels: bool, in_slabs: bool = False) -> int:
    """Rows a chunk: enough to feed the GEMM, few enough that a chunk's logits stay small; even, but for slabs.

    1.17 GiB is 4,096 rows of Qwen3's vocabulary: with a hidden size of 1,024 their gradient's product fills 128 of a
    Hopper GPU's 132 multiprocessors, and 104 with what 1 GiB would hold. Plain PyTorch makes several fp32 copies of a
    chunk, so it gets a sixteenth of a GiB. In slabs of the vocabulary no number of rows is too large: 4,096, and the
    last chunk what is left, whose gradients' tiles fill the multiprocessors best (4,915 rows of Llama-3's head are 3%
    faster than in two equal chunks, and 8,192 at once no faster than 4,096).
    """
    if in_slabs:
        return min(4096, -(-num_rows // 128) * 128)
    budget = 7 * 2**30 // 6 if kernels else 2**26
    most = max(128, min(4096, budget // bytes_per_row // 128 * 128))
    chunks = max(1, -(-num_rows // most))
    return -(-num_rows // chunks // 128) * 128


def _row_stride(vocabulary: int) -> int:
    """Rows of logits start at multiples of 64 elements: an odd vocabulary costs neither GEMMs nor kernel their wide
    loads."""
    return -(-vocabulary // 64) * 64


def chunk_bytes(num_rows: int, hidden: int, vocabulary: int, itemsize: int, in_slabs: bool) -> int:
    """What one chunk of the rows takes for a while, its results aside."""
    stride = _row_stride(vocabulary)
    chunk = min(num_rows, _chunk_rows(num_rows, stride * itemsize, kernels=True, in_slabs=in_slabs))
    made = frozen_head.chunk_bytes(chunk, hidden, vocabulary) if in_slabs else chunk * (stride * itemsize + 4 * hidden)
    return made + chunk * hidden * itemsize


def kept_dtype(hidden_dtype: torch.dtype) -> torch.dtype:
    """What the hidden states' gradient is kept in for the backward pass, when it is divided already."""
    return torch.bfloat16 if hidden_dtype == torch.bfloat16 else precise(hidden_dtype)


def _empty_results(hidden_NH, weight_VH, rows_K, divided, dtype, stats, needs) -> tuple[Tensor, ...]:
    """The kept rows' nll, entropy and top-1, then the gradients of hidden, weight and bias; empty if not asked for."""
    (K,), (V, H) = rows_K.shape, weight_VH.shape
    shapes = [(K,), (K,), (K,), (K, H), (V, H), (V,)]
    asked = [True, stats, stats, *needs]
    # Gradients too: they are still to be scaled, and rounded then. That of hidden in bf16 is divided already, and what
    # the backward pass multiplies it by is seldom other than 1; fp16's gradients lie too near to 0.
    dtypes = [precise(dtype)] * 6
    dtypes[2] = torch.bool
    if divided:
        dtypes[3] = kept_dtype(hidden_NH.dtype)
    return tuple(hidden_NH.new_empty(s if a else (0,), dtype=d) for s, a, d in zip(shapes, asked, dtypes, strict=True))


def _through_head(d_logits_CV: Tensor, weight_VH: Tensor, divisor: Tensor | None, out_CH: Tensor) -> None:
    """out = d_logits @ weight / divisor. On a CPU PyTorch rounds every product of half-precision numbers, and with a
    widened head the loss would take two to four times as long."""
    dtype = precise(d_logits_CV.dtype) if d_logits_CV.is_cuda else d_logits_CV.dtype
    product_CH = out_CH if out_CH.dtype == dtype else d_logits_CV.new_empty(out_CH.shape, dtype=dtype)
    if d_logits_CV.is_cuda:
        accumulate_product(product_CH, d_logits_CV, weight_VH, beta=0)
    else:
        torch.mm(d_logits_CV, weight_VH, out=product_CH)  # which autocast leaves as it is
    if divisor is not None:
        torch.div(product_CH.to(divisor.dtype), divisor, out=out_CH)
    elif product_CH is not out_CH:
        out_CH.copy_(product_CH)


@torch.library.custom_op("truetune::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, rows_K: Tensor,
    row_weights_K: Tensor | None, num_items: Tensor | None, dtype: torch.dtype, logit_scale: float,
    softcap: float | None, label_smoothing: float, dft: bool, stats: bool, needs_hidden: bool, needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of the rows' losses over num_items (0-d; None: 1), nll_K, entropy_K, is_top1_K, and the gradients to
    hidden_NH[rows_K], weight_VH and bias_V, still to be divided by gradient_scale(dtype). Those of weight and bias, and
    without num_items that of hidden, are still to be multiplied by logit_scale / num_items."""
    needs = (needs_hidden, needs_weight, needs_bias)
    results = _empty_results(hidden_NH, weight_VH, rows_K, num_items is not None, dtype, stats, needs)
    nll_K, entropy_K, is_top1_K, d_hidden_KH, d_weight_VH, d_bias_V = results
    loss = Loss(logit_scale, softcap, label_smoothing, dft)
    loss_K = torch.empty_like(nll_K)
    divisor = None if num_items is None else num_items / logit_scale
    targets_K = labels_N[rows_K]
    weight_VH = weight_VH.to(dtype)
    d_bias_V.zero_()
    (K,), V = rows_K.shape, len(weight_VH)
    if K == 0:
        d_weight_VH.zero_()

    kernels, stride = use_kernels(d_hidden_KH), _row_stride(V)
    frozen = needs_hidden and not (needs_weight or needs_bias)
    in_slabs = frozen and frozen_head.has_kernels(hidden_NH.device, dtype, weight_VH, bias_V, loss)
    chunk = max(1, min(K, _chunk_rows(K, stride * dtype.itemsize, kernels, in_slabs)))
    if not in_slabs:
        # There they are 0 while a GEMM reads: oneDNN's multiplies what stands behind a row by 0 (its issue 5717).
        padded_logits = hidden_NH.new_empty((chunk, stride), dtype=dtype)
        padded_logits[:, V:] = 0
    cross_entropy = cross_entropy_chunk if kernels else cross_entropy_chunk_torch
    for start in range(0, K, chunk):
        part = slice(start, min(start + chunk, K))
        hidden_CH = hidden_NH[rows_K[part]].to(dtype)
        row_weights = None if row_weights_K is None else row_weights_K[part]
        rows = Rows(targets_K[part], row_weights, loss_K[part], nll_K[part], entropy_K[part], is_top1_K[part])
        if in_slabs:
            frozen_head.frozen_head_chunk(hidden_CH, weight_VH, rows, loss, divisor, d_hidden_KH[part])
            continue
        logits_CV = padded_logits[: len(hidden_CH), :V]
        torch.mm(hidden_CH, weight_VH.T, out=logits_CV)
        if kernels and stride > V:
            padded_logits[:, V:] = -torch.inf
        cross_entropy(logits_CV, bias_V, rows, loss, write_grad=any(needs))
        if needs_hidden:
            _through_head(logits_CV, weight_VH, divisor, d_hidden_KH[part])
        if needs_weight:
            accumulate_product(d_weight_VH, logits_CV.T, hidden_CH, beta=int(start > 0))
        if needs_bias:
            d_bias_V += logits_CV.sum(0, dtype=d_bias_V.dtype)
    loss_sum = loss_K.sum()
    return (loss_sum if num_items is None else loss_sum / num_items, *results)  # type: ignore[return-value]


@linear_cross_entropy_op.register_fake
def _(hidden_NH, weight_VH, bias_V, labels_N, rows_K, row_weights_K, num_items, dtype, logit_scale, softcap,
      label_smoothing, dft, stats, *needs):  # fmt: skip
    results = _empty_results(hidden_NH, weight_VH, rows_K, num_items is not None, dtype, stats, needs)
    return (hidden_NH.new_empty((), dtype=precise(dtype)), *results)


def remember_inputs(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, dtype, logit_scale) -> None:
    ctx.num_rows = len(hidden_NH)
    ctx.dtypes = (hidden_NH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype)
    ctx.logit_scale, ctx.gradient_scale = logit_scale, gradient_scale(dtype)


def finish_gradients(
    ctx: Any, scale: Tensor, num_items: Tensor | None, rows_K: Tensor, d_hidden_KH: Tensor, d_weight_VH: Tensor,
    d_bias_V: Tensor,
):  # fmt: skip
    """The gradients of hidden, weight and bias in the inputs' dtypes: scaled in fp32 and rounded, once but for that of
    hidden in bf16, which comes rounded where there is `num_items`."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative; call backward without create_graph=True.")
    d_hidden_NH = d_weight = d_bias = None
    needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
    hidden_scale = weight_scale = scale * (ctx.logit_scale / ctx.gradient_scale)
    if num_items is not None:  # by which that of hidden is divided, and multiplied by the factor of the logits
        hidden_scale, weight_scale = scale / ctx.gradient_scale, weight_scale / num_items
    if needs_hidden:
        d_hidden_NH = scale_rows(d_hidden_KH, hidden_scale, rows_K, ctx.num_rows, hidden_dtype)
    if needs_weight and weight_dtype == d_weight_VH.dtype:
        d_weight = d_weight_VH.mul_(weight_scale)  # in place: a second fp32 copy of a head of 128k x 4k is 2 GiB
    elif needs_weight:
        d_weight = scale_rows(d_weight_VH, weight_scale, None, len(d_weight_VH), weight_dtype)
    if needs_bias:
        d_bias = (d_bias_V * weight_scale).to(bias_dtype)
    return d_hidden_NH, d_weight, d_bias


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden_NH, weight_VH, bias_V, _, rows_K, _, num_items, dtype, logit_scale, *_ = inputs
    remember_inputs(ctx, hidden_NH, weight_VH, bias_V, dtype, logit_scale)
    ctx.save_for_backward(num_items, rows_K, *output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros of [V, H] for the outputs that have no gradient


def _backward(ctx: Any, grad_loss: Tensor | None, *_):
    grads = [None] * 3 if grad_loss is None else finish_gradients(ctx, grad_loss, *ctx.saved_tensors)
    return *grads, *[None] * 13


linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


# ----------------------------------------------------------------------------------------------------------------------
# Public functions


class Stats(NamedTuple):
    """Of each kept row, detached."""

    nll_K: Tensor  # negative log-likelihood of the label, neither smoothed nor weighted; fp32, nats
    entropy_K: Tensor  # of the predicted distribution; fp32, nats
    is_top1_K: Tensor  # whether the label is the first of the largest logits; bool


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, rows: Tensor | None = None,
    num_items: int | Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    label_smoothing: float = 0.0, loss_type: str = "nll", ignore_index: int = -100, return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:  # fmt: skip
    """Cross-entropy of the logits `(hidden @ weight.T + bias) * logit_scale`, soft-capped, never holding all of them.

    Args:
        hidden: [..., H] bf16, fp16, fp32, or (in plain PyTorch) fp64.
        weight: [V, H] of the same dtype, or any under autocast, which is obeyed; frozen or trained.
        labels: [...] int64, `labels[i]` the target of `hidden[i]`: the caller shifts.
        bias: [V].
        rows: [K] int64 indexes into the flattened leading dimensions: those to keep, none twice, none with an ignored
            label. With them given the host never waits for the device; None: found here, from the labels.
        num_items: int or 0-d tensor, what the sum over the rows is divided by, at least 1. Default: K. Has no gradient.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv:2408.00118).
        logit_scale: positive.
        label_smoothing: share of the target spread evenly over the vocabulary, as in `F.cross_entropy`.
        loss_type: "nll", or "dft": each row weighted by the detached probability of its label (arXiv:2508.05629).
        return_stats: return `(loss, Stats)`.

    Returns:
        The loss, 0-d, fp32 (fp64 for fp64). Zero, with zero gradients, where no row is kept.

    Gradients are made in this forward pass, those of the head summed over chunks in fp32; the backward pass scales them
    in fp32 and rounds once, in place where it can: a second backward then raises. Those of bf16 hidden states are
    divided by num_items and rounded here, and again where the backward pass multiplies them by anything but 1.

    A label outside [0, V) in a kept row makes the loss NaN on a GPU and raises on a CPU.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together.
    """
    if loss_type not in ("nll", "dft"):
        raise ValueError(f"loss_type is {loss_type!r}; choose 'nll' or 'dft'.")
    if loss_type == "dft" and label_smoothing:
        raise ValueError("loss_type='dft' has no label smoothing; set label_smoothing to 0.")
    if isinstance(num_items, Tensor) and num_items.ndim:
        raise ValueError(f"num_items has shape {tuple(num_items.shape)}; give an int or a 0-d tensor.")
    *inputs, dtype = check_inputs(hidden, weight, bias, labels, rows, logit_scale, ignore_index)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if isinstance(num_items, Tensor):
        num_items = num_items.detach().to(hidden.device, precise(dtype), non_blocking=True).clamp(min=1)
    else:
        count = max(1, inputs[-1].shape[0] if num_items is None else num_items)
        num_items = torch.full((), count, dtype=precise(dtype), device=hidden.device)
    loss, *stats, _, _, _ = linear_cross_entropy_op(
        *inputs, None, num_items, dtype, logit_scale, softcap, label_smoothing, loss_type == "dft", return_stats, *needs
    )
    return (loss, Stats(*stats)) if return_stats else loss


def check_inputs(hidden, weight, bias, labels, rows, logit_scale, ignore_index) -> tuple:
    """hidden_NH, weight_VH, bias_V, labels_N, rows_K, and the dtype of the products."""
    if labels.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, labels))
        raise ValueError(f"hidden, weight and labels have shapes {shapes}; they must be [..., H], [V, H] and [...].")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}], as the weight has rows.")
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; it must be int64 of shape [K].")
    if logit_scale <= 0:
        raise ValueError(f"logit_scale is {logit_scale}; it must be positive.")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    elif hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    else:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; cast one of them or use torch.autocast.")
    labels_N = labels.reshape(-1)
    rows_K = (labels_N != ignore_index).nonzero().squeeze(1) if rows is None else rows
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels_N, rows_K, dtype


# ----------------------------------------------------------------------------------------------------------------------
# Reference


def reference_logits(hidden, weight, labels, bias, rows, softcap, logit_scale, ignore_index) -> tuple[Tensor, Tensor]:
    """The kept rows' targets [K] and final logits [K, V], these in fp32 or fp64."""
    labels_N = labels.reshape(-1)
    rows_K = (labels_N != ignore_index).nonzero().squeeze(1) if rows is None else rows
    logits_KV = F.linear(hidden.reshape(-1, hidden.shape[-1])[rows_K], weight, bias)
    return labels_N[rows_K], final_logits(logits_KV, None, logit_scale, softcap)[0]


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, rows: Tensor | None = None,
    num_items: int | Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
    label_smoothing: float = 0.0, loss_type: str = "nll", ignore_index: int = -100,
) -> tuple[Tensor, Stats]:  # fmt: skip
    """`linear_cross_entropy` as PyTorch would do it, with the full logits; returns `(loss, Stats)`."""
    targets_K, logits_KV = reference_logits(hidden, weight, labels, bias, rows, softcap, logit_scale, ignore_index)
    nll_K = F.cross_entropy(logits_KV, targets_K, reduction="none")
    loss_K = F.cross_entropy(logits_KV, targets_K, reduction="none", label_smoothing=label_smoothing)
    if loss_type == "dft":
        loss_K = loss_K * (-nll_K).exp().detach()
    num_items = torch.as_tensor(len(targets_K) if num_items is None else num_items, device=loss_K.device)
    entropy_K = torch.special.entr(logits_KV.detach().softmax(-1)).sum(-1)
    is_top1_K = logits_KV.argmax(-1) == targets_K
    return loss_K.sum() / num_items.clamp(min=1), Stats(nll_K.detach(), entropy_K, is_top1_K)
