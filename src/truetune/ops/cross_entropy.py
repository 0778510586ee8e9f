"""The loss of a chunk of logits, and its gradient written over them.

Letters of tensor shapes: C rows of one chunk, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from truetune.ops.backend import tl, triton

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    _LOG2_E = tl.constexpr(1.4426950408889634)
    _LOWEST = tl.constexpr(-1.0e30)  # below every logit, and finite: the difference of two of them is 0, not NaN

    @triton.jit
    def _tanh(x, FULL: tl.constexpr):
        """To 1e-7; with FULL to about one unit in the last place, by Cephes' polynomial for small |x|."""
        decay = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
        tanh = (1.0 - decay) / (1.0 + decay)
        tanh = tl.where(x < 0.0, -tanh, tanh)
        if FULL:
            square = x * x
            small = -5.70498872745e-3 * square + 2.06390887954e-2
            small = small * square - 5.37397155531e-2
            small = small * square + 1.33314422036e-1
            small = small * square - 3.33332819422e-1
            tanh = tl.where(tl.abs(x) < 0.625, small * square * x + x, tanh)
        return tanh

    @triton.jit
    def _load_logits(row_ptr, cols, bias_ptr, stride, V, scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
        """The final logits in the kernel's `unit`, which spares a product an element."""
        raw = tl.load(row_ptr + cols, mask=cols < stride, other=float("-inf"))
        z = raw.to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        if HAS_BIAS or HAS_SOFTCAP:
            z *= scale
        if HAS_SOFTCAP:
            z = tl.where(cols < V, _tanh(z, raw.dtype == tl.float32), float("-inf"))
        return z

    @triton.jit
    def weigh_row(nll, loss, weight, row_weights_ptr, row, HAS_ROW_WEIGHTS: tl.constexpr, DFT: tl.constexpr):
        """The row's loss, and the factor of its gradient."""
        if DFT:
            loss = tl.exp(-nll) * nll
            weight *= tl.exp(-nll)
        if HAS_ROW_WEIGHTS:
            weight *= tl.load(row_weights_ptr + row)
        return loss, weight

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr,  # [C, V] with row stride `stride`, -inf from V on; becomes its own gradient, 0 from V on
        targets_ptr,  # [C] int64
        bias_ptr,  # [V]
        row_weights_ptr,  # [C] fp32
        loss_ptr, nll_ptr, entropy_ptr, top1_ptr,  # [C]
        stride, V, scale, softcap, smoothing, grad_scale,  # the scale is that of the logits over the softcap
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ROW_WEIGHTS: tl.constexpr, SMOOTHING: tl.constexpr,
        DFT: tl.constexpr, STATS: tl.constexpr, WRITE_GRAD: tl.constexpr,
        LANES: tl.constexpr, VECTOR: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """One program a row, two passes over it.

        A tile is LANES x VECTOR logits: LANES are the threads, VECTOR is what one of them loads at once, 16 bytes.
        Every lane keeps its own maximum and sums, so no thread waits for another before the end of the first pass.
        """
        TILE: tl.constexpr = LANES * VECTOR
        row = tl.program_id(0)
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
        unit = softcap if HAS_SOFTCAP else 1.0 if HAS_BIAS else scale  # of the loaded logits, `z`
        unit_log2 = unit * _LOG2_E

        target = tl.load(targets_ptr + row)
        is_label = (target >= 0) & (target < V)
        z_target = _load_logits(
            row_ptr, tl.where(is_label, target, 0), bias_ptr, stride, V, scale, HAS_BIAS, HAS_SOFTCAP
        )
        z_target = tl.where(is_label, z_target, float("nan"))  # a label outside the vocabulary must not pass unseen

        top = tl.full([LANES], _LOWEST, tl.float32)
        total = tl.zeros([LANES], tl.float32)  # of exp(u), u = (z - top) * unit
        weighted = tl.zeros([LANES], tl.float32)  # of exp(u) * (z - top)
        plain = tl.zeros([LANES], tl.float32)  # of z
        first = tl.zeros([LANES], tl.int32)  # start of the tile where the lane met its maximum first
        for start in tl.range(0, stride, TILE, num_stages=STAGES):
            cols = start + offsets
            z = _load_logits(row_ptr, cols, bias_ptr, stride, V, scale, HAS_BIAS, HAS_SOFTCAP)
            new_top = tl.maximum(top, tl.max(z, 1))
            shift = top - new_top
            below = z - new_top[:, None]
            e = tl.exp2(below * unit_log2)
            decay = tl.exp2(shift * unit_log2)
            if STATS:
                tile_weighted = tl.sum(e * tl.maximum(below, _LOWEST), 1)  # 0, not NaN, for z of -inf
                weighted = (weighted + total * shift) * decay + tile_weighted
                first = tl.where(new_top > top, start, first)
            if SMOOTHING:
                plain += tl.sum(tl.where(cols < V, z, 0.0), 1)
            total = total * decay + tl.sum(e, 1)
            top = new_top

        row_top = tl.max(top, 0)
        shift = top - row_top
        decay = tl.exp2(shift * unit_log2)
        row_total = tl.sum(total * decay, 0)
        log_total = tl.log(row_total)

        nll = log_total - (z_target - row_top) * unit
        loss = nll
        row_weight = grad_scale + 0.0
        if SMOOTHING:
            mean_nll = log_total - (tl.sum(plain, 0) / V - row_top) * unit
            loss = (1.0 - smoothing) * nll + smoothing * mean_nll
        loss, row_weight = weigh_row(nll, loss, row_weight, row_weights_ptr, row, HAS_ROW_WEIGHTS, DFT)
        tl.store(nll_ptr + row, nll)
        tl.store(loss_ptr + row, loss)
        if STATS:
            row_weighted = tl.sum((weighted + total * shift) * decay, 0)
            tl.store(entropy_ptr + row, log_total - row_weighted * unit / row_total)
            # The first of equal maxima, as torch.argmax: it is in the first tile where any lane met the maximum. The
            # tile decides, not z_target, which the compiler may have rounded otherwise.
            is_top1 = z_target >= row_top - 1e-5 * tl.abs(row_top)
            if is_top1:
                cols = tl.min(tl.where(top == row_top, first, V), 0) + offsets
                z = _load_logits(row_ptr, cols, bias_ptr, stride, V, scale, HAS_BIAS, HAS_SOFTCAP)
                tile_top = tl.max(tl.max(z, 1), 0)
                is_top1 = tl.min(tl.min(tl.where(z == tile_top, cols, V), 1), 0) == target
            tl.store(top1_ptr + row, is_top1)

        if WRITE_GRAD:
            tl.debug_barrier()  # every thread has read the target's logit
            factor = row_weight / row_total
            uniform = row_weight * smoothing / V
            last = (stride - 1) // TILE * TILE
            for done in tl.range(0, stride, TILE, num_stages=STAGES):
                cols = last - done + offsets  # backwards: what was read last is still in the L2 cache
                z = _load_logits(row_ptr, cols, bias_ptr, stride, V, scale, HAS_BIAS, HAS_SOFTCAP)
                grad = tl.exp2((z - row_top) * unit_log2) * factor
                if SMOOTHING:
                    grad -= uniform
                if HAS_SOFTCAP:
                    grad *= 1.0 - z * z
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < stride)
            tl.debug_barrier()  # the target's logit and the padding are written a second time
            grad = tl.exp2((z_target - row_top) * unit_log2) * factor - row_weight
            if SMOOTHING:
                grad += row_weight * smoothing - uniform
            if HAS_SOFTCAP:
                grad *= 1.0 - z_target * z_target
            tl.store(row_ptr + target, grad.to(logits_ptr.dtype.element_ty), mask=is_label)
            padding = V + tl.arange(0, 64)
            tl.store(row_ptr + padding, 0.0, mask=padding < stride)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers

_NUM_WARPS, _STAGES = 32, 1  # of the cross-entropy kernel: two rows fill a multiprocessor of a Hopper GPU


class Loss(NamedTuple):
    """How what the GEMM gives becomes a loss."""

    logit_scale: float
    softcap: float | None
    label_smoothing: float
    dft: bool


class Rows(NamedTuple):
    """What a chunk's rows bring (`targets`, `weights`), and where their results go (entropy and top-1 may be empty)."""

    targets: Tensor
    weights: Tensor | None
    loss: Tensor
    nll: Tensor
    entropy: Tensor
    is_top1: Tensor


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, sums over chunks and scales."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_scale(dtype: torch.dtype) -> float:
    """What logit gradients are stored multiplied by. They lie in [-1, 1], many below 1e-5, where fp16 has two digits
    left. A power of two; on a CPU products with the head's weights overflow where those exceed 32."""
    return 1024.0 if dtype == torch.float16 else 1.0


def accumulate_product(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta * out + a @ b, summed in the dtype of `out`; beta 0 overwrites whatever was there."""
    if a.dtype != out.dtype and out.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


def cross_entropy_chunk(logits_CV: Tensor, bias_V: Tensor | None, rows: Rows, loss: Loss, write_grad: bool) -> None:
    """Writes the rows' results; and, if asked, over the logits, each row's gradient to them as they were before
    `logit_scale`, times the row's weight and `gradient_scale`."""
    with torch.cuda.device_of(logits_CV):
        _cross_entropy_kernel[(len(logits_CV),)](
            logits_CV, rows.targets, bias_V, rows.weights, rows.loss, rows.nll, rows.entropy, rows.is_top1,
            logits_CV.stride(0), logits_CV.shape[1],
            loss.logit_scale / (loss.softcap or 1.0), loss.softcap or 1.0, loss.label_smoothing,
            gradient_scale(logits_CV.dtype),
            HAS_BIAS=bias_V is not None, HAS_SOFTCAP=loss.softcap is not None, HAS_ROW_WEIGHTS=rows.weights is not None,
            SMOOTHING=loss.label_smoothing > 0, DFT=loss.dft, STATS=rows.entropy.numel() > 0, WRITE_GRAD=write_grad,
            LANES=32 * _NUM_WARPS, VECTOR=16 // logits_CV.element_size(), STAGES=_STAGES,
            num_warps=_NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip


def cross_entropy_chunk_torch(
    logits_CV: Tensor, bias_V: Tensor | None, rows: Rows, loss: Loss, write_grad: bool
) -> None:
    """`cross_entropy_chunk` in plain PyTorch."""
    z_CV, slope_CV = final_logits(logits_CV, bias_V, loss.logit_scale, loss.softcap)
    log_probs_CV = z_CV.log_softmax(-1)
    probs_CV = log_probs_CV.exp()
    target_C1 = rows.targets[:, None]
    nll_C = -log_probs_CV.gather(1, target_C1).squeeze(1)
    weights_C = (-nll_C).exp() if loss.dft else torch.ones_like(nll_C)
    rows.nll.copy_(nll_C)
    if loss.label_smoothing:
        nll_C = (1 - loss.label_smoothing) * nll_C - loss.label_smoothing * log_probs_CV.mean(-1)
    rows.loss.copy_(weights_C * nll_C)
    if rows.entropy.numel():
        rows.entropy.copy_(-(probs_CV * log_probs_CV.clamp(min=-1e30)).sum(-1))  # 0, not NaN, for probabilities of 0
        rows.is_top1.copy_(z_CV.argmax(-1) == rows.targets)
    if write_grad:
        if rows.weights is not None:
            weights_C = weights_C * rows.weights
        probs_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, loss.label_smoothing - 1, dtype=probs_CV.dtype))
        probs_CV -= loss.label_smoothing / z_CV.shape[1]
        probs_CV *= weights_C[:, None] * gradient_scale(logits_CV.dtype)
        if slope_CV is not None:
            probs_CV *= slope_CV
        logits_CV.copy_(probs_CV)


def final_logits(
    raw: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """What the GEMM gave, with bias, scale and softcap, in fp32 or fp64; and the slope of the softcap."""
    z = raw.to(precise(raw.dtype))
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is None:
        return z, None
    tanh = torch.tanh(z / softcap)
    return softcap * tanh, 1 - tanh.detach() ** 2
