"""The LM head and its loss in one operation that never holds the full logits.

The kept rows go through the head in chunks of about 4,096: one GEMM makes a chunk's logits, one kernel turns them into their
gradient in place, and one or two more GEMMs turn that into the gradients of the hidden states and of the head. All of it
happens in the forward pass, so nothing is recomputed; the backward pass only scales.

Letters of tensor shapes: N positions (the flattened leading dimensions), K kept rows, C rows of one chunk, H hidden size,
V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: everything runs in plain PyTorch
    triton = None

FORCE_KERNELS = False  # tests set it, to run the kernels on a CPU in Triton's interpreter


# ---------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    _LOW = tl.constexpr(-1.0e30)  # stands for minus infinity where the difference of two of them must not be NaN

    @triton.jit
    def _tanh(x):
        """tanh in fp32 to about one unit in the last place: Cephes' polynomial for small |x|, exponentials elsewhere."""
        square = x * x
        small = -5.70498872745e-3 * square + 2.06390887954e-2
        small = small * square - 5.37397155531e-2
        small = small * square + 1.33314422036e-1
        small = small * square - 3.33332819422e-1
        small = small * square * x + x
        decay = tl.exp(-2.0 * tl.abs(x))
        large = (1.0 - decay) / (1.0 + decay)
        return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))

    @triton.jit
    def _final_logits(raw, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
        """What the GEMM gave, with bias, scale and softcap, in fp32."""
        z = raw.to(tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
        z *= logit_scale
        if HAS_SOFTCAP:
            z = softcap * _tanh(z / softcap)
        return z

    @triton.jit
    def _load_tile(
        row_ptr, cols, bias_ptr, V, logit_scale, softcap,
        HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        if MASKED:
            raw = tl.load(row_ptr + cols, mask=cols < V, other=0.0)
        else:
            raw = tl.load(row_ptr + cols)
        z = _final_logits(raw, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        if MASKED:
            z = tl.where(cols < V, z, _LOW)
        return z

    @triton.jit
    def _online(z, cols, start, V, top, total, weighted, plain, first, STATS: tl.constexpr, SMOOTHING: tl.constexpr):
        """Adds a tile to each lane's running maximum and sums: no lane waits for another inside the loop."""
        new_top = tl.maximum(top, tl.max(tl.max(z, 2), 0))
        shift = top - new_top
        u = z - new_top[None, :, None]
        e = tl.exp(u)
        decay = tl.exp(shift)
        if STATS:
            # sum of exp(u) * u, from which the entropy is made; an exp of 0 must not meet a u of minus infinity
            tile_weighted = tl.sum(tl.sum(e * tl.maximum(u, _LOW), 2), 0)
            weighted = (weighted + total * shift) * decay + tile_weighted
            first = tl.where(new_top > top, start, first)
        total = total * decay + tl.sum(tl.sum(e, 2), 0)
        if SMOOTHING:
            plain += tl.sum(tl.sum(tl.where(cols < V, z, 0.0), 2), 0)
        return new_top, total, weighted, plain, first

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr,  # [C, V], row stride `stride`; becomes its own gradient if WRITE_GRAD
        targets_ptr,  # [C] int64
        bias_ptr,  # [V]
        row_weights_ptr,  # [C] fp32
        loss_ptr, nll_ptr, entropy_ptr, top1_ptr,  # [C]
        stride, V, logit_scale, softcap, smoothing, grad_scale,
        HAS_BIAS: tl.constexpr,
        HAS_SOFTCAP: tl.constexpr,
        HAS_ROW_WEIGHTS: tl.constexpr,
        SMOOTHING: tl.constexpr,
        DFT: tl.constexpr,
        STATS: tl.constexpr,
        WRITE_GRAD: tl.constexpr,
        GROUPS: tl.constexpr,
        LANES: tl.constexpr,
        VECTOR: tl.constexpr,
    ):  # fmt: skip
        """One program a row, two passes over it. A tile is GROUPS x LANES x VECTOR logits: VECTOR of them are one 16-byte
        load of one thread, LANES are the threads, GROUPS are loads in flight; reductions over GROUPS and VECTOR stay
        inside a thread."""
        TILE: tl.constexpr = GROUPS * LANES * VECTOR
        row = tl.program_id(0)
        row_ptr = logits_ptr + row.to(tl.int64) * stride
        offsets = (
            tl.arange(0, GROUPS)[:, None, None] * (LANES * VECTOR)
            + tl.arange(0, LANES)[None, :, None] * VECTOR
            + tl.arange(0, VECTOR)[None, None, :]
        )
        V_full = V // TILE * TILE  # tiles without a mask; what is left is one masked tile

        top = tl.full([LANES], _LOW, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        weighted = tl.zeros([LANES], tl.float32)
        plain = tl.zeros([LANES], tl.float32)
        first = tl.zeros([LANES], tl.int32)  # start of the tile in which the lane met its maximum first
        for start in tl.range(0, V_full, TILE):
            cols = start + offsets
            z = _load_tile(row_ptr, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, False)
            top, total, weighted, plain, first = _online(
                z, cols, start, V, top, total, weighted, plain, first, STATS, SMOOTHING
            )
        if V_full < V:
            cols = V_full + offsets
            z = _load_tile(row_ptr, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, True)
            top, total, weighted, plain, first = _online(
                z, cols, V_full, V, top, total, weighted, plain, first, STATS, SMOOTHING
            )

        row_top = tl.max(top, 0)
        shift = top - row_top
        decay = tl.exp(shift)
        row_total = tl.sum(total * decay, 0)
        log_total = tl.log(row_total)

        target = tl.load(targets_ptr + row)
        is_label = (target >= 0) & (target < V)
        target_raw = tl.load(row_ptr + target, mask=is_label, other=0.0)
        z_target = _final_logits(target_raw, target, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        z_target = tl.where(is_label, z_target, float("nan"))  # a label outside the vocabulary must not pass unseen
        nll = log_total - (z_target - row_top)
        loss = nll
        row_weight = grad_scale + 0.0
        if SMOOTHING:
            loss = (1.0 - smoothing) * nll + smoothing * (log_total + row_top - tl.sum(plain, 0) / V)
        if DFT:
            target_prob = tl.exp(-nll)
            loss = target_prob * nll
            row_weight *= target_prob
        if HAS_ROW_WEIGHTS:
            row_weight *= tl.load(row_weights_ptr + row)
        tl.store(nll_ptr + row, nll)
        tl.store(loss_ptr + row, loss)
        if STATS:
            row_weighted = tl.sum((weighted + total * shift) * decay, 0)
            tl.store(entropy_ptr + row, log_total - row_weighted / row_total)
            # the first of equal maxima, as torch.argmax: it is in the first tile that any lane met the maximum in
            cols = tl.min(tl.where(top == row_top, first, V), 0) + offsets
            z = _load_tile(row_ptr, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, True)
            tile_top = tl.max(tl.max(tl.max(z, 2), 0), 0)
            argmax = tl.min(tl.min(tl.min(tl.where(z == tile_top, cols, V), 2), 0), 0)
            tl.store(top1_ptr + row, argmax == target)

        if WRITE_GRAD:
            tl.debug_barrier()  # every thread has read the target's logit before any thread overwrites it
            # backwards: what the first pass read last is still in the L2 cache
            if V_full < V:
                cols = V_full + offsets
                z = _load_tile(row_ptr, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, True)
                grad = _gradient(
                    z, cols, target, row_top, row_total, row_weight, V, softcap, smoothing, HAS_SOFTCAP, SMOOTHING
                )
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)
            for done in tl.range(0, V_full, TILE):
                cols = V_full - TILE - done + offsets
                z = _load_tile(row_ptr, cols, bias_ptr, V, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, False)
                grad = _gradient(
                    z, cols, target, row_top, row_total, row_weight, V, softcap, smoothing, HAS_SOFTCAP, SMOOTHING
                )
                tl.store(row_ptr + cols, grad.to(logits_ptr.dtype.element_ty))

    @triton.jit
    def _gradient(
        z, cols, target, row_top, row_total, row_weight, V, softcap, smoothing,
        HAS_SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    ):  # fmt: skip
        """Of the row's loss to (hidden @ weight.T + bias) * logit_scale, times the row's weight."""
        grad = tl.exp(z - row_top) * (row_weight / row_total)
        if SMOOTHING:
            grad -= row_weight * smoothing / V
            grad -= tl.where(cols == target, row_weight * (1.0 - smoothing), 0.0)
        else:
            grad -= tl.where(cols == target, row_weight, 0.0)
        if HAS_SOFTCAP:
            squashed = z / softcap
            grad *= 1.0 - squashed * squashed
        return grad

    @triton.jit
    def _scale_rows_kernel(
        x_ptr, rows_ptr, scale_ptr, out_ptr, cols_in_row, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """out[rows[i]] = x[i] * scale, multiplied in fp32 and rounded once."""
        row = tl.program_id(0).to(tl.int64)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = cols < cols_in_row
        x = tl.load(x_ptr + row * cols_in_row + cols, mask=mask).to(tl.float32) * tl.load(scale_ptr)
        if HAS_ROWS:
            row = tl.load(rows_ptr + row)
        tl.store(out_ptr + row * cols_in_row + cols, x.to(out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers

_NUM_WARPS, _GROUPS = 16, 2


class _Loss(NamedTuple):
    """How a logit from the GEMM becomes a loss."""

    logit_scale: float
    softcap: float | None
    label_smoothing: float
    dft: bool


def _use_kernels(tensor: Tensor) -> bool:
    return triton is not None and tensor.dtype != torch.float64 and (tensor.is_cuda or FORCE_KERNELS)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _gradient_scale(dtype: torch.dtype) -> float:
    """What logit gradients are stored multiplied by. They lie in [-1, 1], many below 1e-5, where fp16 has two digits left.
    A power of two; products with the head's weights overflow only where those exceed 32."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _chunk_rows(num_rows: int, logits_bytes_per_row: int, kernels: bool) -> int:
    """Rows a chunk: enough to feed the GEMM, few enough that a chunk's logits stay under a GiB, of even size.

    Plain PyTorch makes several fp32 copies of a chunk, so it gets a sixteenth of that.
    """
    budget = 2**30 if kernels else 2**26
    most = max(128, min(4096, budget // logits_bytes_per_row // 128 * 128))
    chunks = max(1, -(-num_rows // most))
    return -(-num_rows // chunks // 128) * 128


def _cross_entropy_chunk(
    logits_CV: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    row_weights_C: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    loss: _Loss,
    write_grad: bool,
) -> None:
    """Writes the rows' loss, nll, entropy and top-1 (the last two unless empty) into `outputs`, and, if asked, the gradient
    of each row's loss (to the logits before the scale; times the row's weight) over the logits."""
    loss_C, nll_C, entropy_C, top1_C = outputs
    vocab = logits_CV.shape[1]
    with torch.cuda.device_of(logits_CV):
        _cross_entropy_kernel[(len(logits_CV),)](
            logits_CV, targets_C, bias_V, row_weights_C, loss_C, nll_C, entropy_C, top1_C, logits_CV.stride(0), vocab,
            loss.logit_scale, loss.softcap or 0.0, loss.label_smoothing, _gradient_scale(logits_CV.dtype),
            HAS_BIAS=bias_V is not None,
            HAS_SOFTCAP=loss.softcap is not None,
            HAS_ROW_WEIGHTS=row_weights_C is not None,
            SMOOTHING=loss.label_smoothing > 0,
            DFT=loss.dft,
            STATS=entropy_C.numel() > 0,
            WRITE_GRAD=write_grad,
            GROUPS=_GROUPS,
            LANES=32 * _NUM_WARPS,
            VECTOR=16 // logits_CV.element_size(),
            num_warps=_NUM_WARPS,
        )  # fmt: skip


def _cross_entropy_chunk_torch(
    logits_CV: Tensor,
    targets_C: Tensor,
    bias_V: Tensor | None,
    row_weights_C: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    loss: _Loss,
    write_grad: bool,
) -> None:
    """`_cross_entropy_chunk` in plain PyTorch."""
    loss_C, nll_C, entropy_C, top1_C = outputs
    z_CV = _final_logits_torch(logits_CV, bias_V, loss.logit_scale, loss.softcap)
    log_probs_CV = z_CV.log_softmax(-1)
    probs_CV = log_probs_CV.exp()
    nll_C.copy_(-log_probs_CV.gather(1, targets_C[:, None]).squeeze(1))
    target_probs_C = (-nll_C).exp()
    row_loss_C = (1 - loss.label_smoothing) * nll_C - loss.label_smoothing * log_probs_CV.mean(-1)
    loss_C.copy_(target_probs_C * row_loss_C if loss.dft else row_loss_C)
    if entropy_C.numel():
        entropy_C.copy_(torch.special.entr(probs_CV).sum(-1))
        top1_C.copy_(z_CV.argmax(-1) == targets_C)
    if write_grad:
        weights_C = torch.full_like(nll_C, _gradient_scale(logits_CV.dtype))
        if loss.dft:
            weights_C = weights_C * target_probs_C
        if row_weights_C is not None:
            weights_C = weights_C * row_weights_C
        grad_CV = probs_CV - loss.label_smoothing / z_CV.shape[1]
        on_target_C1 = torch.full_like(nll_C, loss.label_smoothing - 1)[:, None]
        grad_CV.scatter_add_(1, targets_C[:, None], on_target_C1)
        grad_CV *= weights_C[:, None]
        if loss.softcap is not None:
            grad_CV *= 1 - (z_CV / loss.softcap) ** 2
        logits_CV.copy_(grad_CV)


def _final_logits_torch(raw: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> Tensor:
    """What the GEMM gave, with bias, scale and softcap, in fp32 or fp64."""
    z = raw.to(_accumulation_dtype(raw.dtype))
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _accumulate_product(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = beta * out + a @ b, the products summed in the dtype of `out`; beta 0 also overwrites NaN."""
    if a.dtype != out.dtype and out.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, out=out)


# ---------------------------------------------------------------------------------------------------------------------
# The ops


def _outputs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    rows_K: Tensor,
    dtype: torch.dtype,
    stats: bool,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Uninitialized nll, entropy, top-1 and gradients of hidden rows, weight and bias; those not asked for are empty."""
    (K,), (V, H) = rows_K.shape, weight_VH.shape
    precise = _accumulation_dtype(dtype)

    def empty(asked: bool, *shape: int, dtype: torch.dtype) -> Tensor:
        return hidden_NH.new_empty(shape if asked else (0,), dtype=dtype)

    return (
        empty(True, K, dtype=precise),
        empty(stats, K, dtype=precise),
        empty(stats, K, dtype=torch.bool),
        empty(needs[0], K, H, dtype=dtype),
        empty(needs[1], V, H, dtype=precise),
        empty(needs[2], V, dtype=precise),
    )


@torch.library.custom_op("truetune::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    rows_K: Tensor,
    row_weights_K: Tensor | None,
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
    label_smoothing: float,
    dft: bool,
    stats: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum of the rows' losses, nll_K, entropy_K, is_top1_K, and the sum's gradients to hidden_NH[rows_K], weight and bias,
    those still to be multiplied by `_gradient_factor`."""
    needs = (needs_hidden, needs_weight, needs_bias)
    buffers = _outputs(hidden_NH, weight_VH, rows_K, dtype, stats, needs)
    nll_K, entropy_K, top1_K, d_hidden_KH, d_weight_VH, d_bias_V = buffers
    loss_K = torch.empty_like(nll_K)
    loss = _Loss(logit_scale, softcap, label_smoothing, dft)
    (K,), V = rows_K.shape, weight_VH.shape[0]
    targets_K = labels_N[rows_K]
    weight_VH = weight_VH.to(dtype)
    if K == 0:
        d_weight_VH.zero_()
    d_bias_V.zero_()

    # rows start at multiples of 64 elements, so that an odd vocabulary does not cost the GEMMs their aligned loads
    kernels = _use_kernels(d_hidden_KH)
    stride = -(-V // 64) * 64
    chunk = min(_chunk_rows(K, stride * dtype.itemsize, kernels), max(K, 1))
    logits_CV = hidden_NH.new_empty((chunk, stride), dtype=dtype)[:, :V]
    cross_entropy = _cross_entropy_chunk if kernels else _cross_entropy_chunk_torch
    for start in range(0, K, chunk):
        part = slice(start, min(start + chunk, K))
        hidden_CH = hidden_NH[rows_K[part]].to(dtype)
        logits = logits_CV[: len(hidden_CH)]
        torch.mm(hidden_CH, weight_VH.T, out=logits)
        row_weights = None if row_weights_K is None else row_weights_K[part]
        outputs = (loss_K[part], nll_K[part], entropy_K[part], top1_K[part])
        cross_entropy(logits, targets_K[part], bias_V, row_weights, outputs, loss, any(needs))
        if needs_hidden:
            torch.mm(logits, weight_VH, out=d_hidden_KH[part])
        if needs_weight:
            _accumulate_product(d_weight_VH, logits.T, hidden_CH, beta=int(start > 0))
        if needs_bias:
            d_bias_V += logits.sum(0, dtype=d_bias_V.dtype)
    return loss_K.sum(), *buffers


@_linear_cross_entropy_op.register_fake
def _(hidden_NH, weight_VH, bias_V, labels_N, rows_K, row_weights_K, dtype, logit_scale, softcap, label_smoothing, dft,
      stats, needs_hidden, needs_weight, needs_bias):  # fmt: skip
    buffers = _outputs(hidden_NH, weight_VH, rows_K, dtype, stats, (needs_hidden, needs_weight, needs_bias))
    return hidden_NH.new_empty((), dtype=_accumulation_dtype(dtype)), *buffers


@torch.library.custom_op("truetune::scale_rows", mutates_args=())
def _scale_rows_op(x_KH: Tensor, scale: Tensor, rows_K: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """out[rows_K] = x_KH * scale and zeros elsewhere, out [num_rows, H] of `dtype`; rows_K None is all rows in order.

    The product with the 0-d scale is taken in fp32: PyTorch would round the scale to x's dtype first.
    """
    K, H = x_KH.shape
    out_NH = (x_KH.new_empty if rows_K is None else x_KH.new_zeros)((num_rows, H), dtype=dtype)
    if not _use_kernels(x_KH):
        scaled_KH = (x_KH.to(scale.dtype) * scale).to(dtype)
        return scaled_KH if rows_K is None else out_NH.index_copy_(0, rows_K, scaled_KH)
    if K > 0:
        block = min(4096, triton.next_power_of_2(H))
        with torch.cuda.device_of(x_KH):
            _scale_rows_kernel[(K, triton.cdiv(H, block))](
                x_KH, rows_K, scale, out_NH, H, HAS_ROWS=rows_K is not None, BLOCK=block, num_warps=8
            )
    return out_NH


@_scale_rows_op.register_fake
def _(x_KH, scale, rows_K, num_rows, dtype):
    return x_KH.new_empty((num_rows, x_KH.shape[1]), dtype=dtype)


def _finished_gradients(
    ctx: Any, scale: Tensor, rows_K: Tensor, d_hidden_KH: Tensor, d_weight_VH: Tensor, d_bias_V: Tensor
):
    """The gradients of hidden, weight and bias in their own dtypes, scaled in fp32 and rounded once."""
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    (num_rows, hidden_dtype), weight_dtype, bias_dtype = ctx.hidden, ctx.weight_dtype, ctx.bias_dtype
    grads: list[Tensor | None] = [None, None, None]
    if needs_hidden:
        grads[0] = _scale_rows_op(d_hidden_KH, scale, rows_K, num_rows, hidden_dtype)
    if needs_weight and weight_dtype == d_weight_VH.dtype:
        grads[1] = d_weight_VH.mul_(scale)  # in place: a second fp32 copy of a head is 2 GiB
    elif needs_weight:
        grads[1] = _scale_rows_op(d_weight_VH, scale, None, len(d_weight_VH), weight_dtype)
    if needs_bias:
        grads[2] = (d_bias_V * scale).to(bias_dtype)
    return grads


def _remember_inputs(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, dtype, logit_scale) -> None:
    ctx.hidden = (len(hidden_NH), hidden_NH.dtype)
    ctx.weight_dtype = weight_VH.dtype
    ctx.bias_dtype = None if bias_V is None else bias_V.dtype
    ctx.gradient_factor = logit_scale / _gradient_scale(dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden_NH, weight_VH, bias_V, _, rows_K, _, dtype, logit_scale, *_ = inputs
    _remember_inputs(ctx, hidden_NH, weight_VH, bias_V, dtype, logit_scale)
    ctx.save_for_backward(rows_K, *output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor, *_: None):
    grads = _finished_gradients(ctx, grad_loss * ctx.gradient_factor, *ctx.saved_tensors)
    return *grads, *[None] * 12


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("truetune::linear_log_probs", mutates_args=())
def _linear_log_probs_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    rows_K: Tensor,
    dtype: torch.dtype,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    settings = (dtype, logit_scale, softcap, 0.0, False, False)
    outputs = _linear_cross_entropy_op(
        hidden_NH, weight_VH, bias_V, labels_N, rows_K, None, *settings, False, False, False
    )
    return -outputs[1]


@_linear_log_probs_op.register_fake
def _(hidden_NH, weight_VH, bias_V, labels_N, rows_K, dtype, logit_scale, softcap):
    return hidden_NH.new_empty(rows_K.shape, dtype=_accumulation_dtype(dtype))


def _log_probs_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    hidden_NH, weight_VH, bias_V, labels_N, rows_K, *settings = inputs
    _remember_inputs(ctx, hidden_NH, weight_VH, bias_V, *settings[:2])
    ctx.settings = (*settings, 0.0, False, False)
    ctx.save_for_backward(hidden_NH, weight_VH, bias_V, labels_N, rows_K)


@once_differentiable
def _log_probs_backward(ctx: Any, grad_K: Tensor):
    # Rows are weighted relative to the largest, so that no product of a small upstream gradient is made in half precision.
    largest = grad_K.abs().amax().clamp(min=torch.finfo(grad_K.dtype).tiny) if len(grad_K) else grad_K.sum()
    *_, rows_K = ctx.saved_tensors
    outputs = _linear_cross_entropy_op(*ctx.saved_tensors, -grad_K / largest, *ctx.settings, *ctx.needs_input_grad[:3])
    grads = _finished_gradients(ctx, largest * ctx.gradient_factor, rows_K, *outputs[4:])
    return *grads, *[None] * 5


_linear_log_probs_op.register_autograd(_log_probs_backward, setup_context=_log_probs_setup_context)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


class Stats(NamedTuple):
    """Of each kept row, detached: negative log-likelihood of the label (fp32, nats; neither smoothed nor weighted), entropy of
    the predicted distribution (fp32, nats), and whether the label is the first of the largest logits (bool)."""

    nll_K: Tensor
    entropy_K: Tensor
    is_top1_K: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: str = "nll",
    ignore_index: int = -100,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of `softcap * tanh((hidden @ weight.T + bias) * logit_scale / softcap)`, without the full logits.

    Args:
        hidden: [..., H], bf16, fp16, fp32, or fp64 (plain PyTorch).
        weight: [V, H] of the same dtype (of any under autocast, which is obeyed); frozen or trained.
        labels: [...] int64, `labels[i]` the target of `hidden[i]`: the caller shifts.
        bias: [V].
        rows: [K] int64, indexes into the flattened leading dimensions, none twice, none with an ignored label. Given, the
            host never waits for the device; None, the rows are found from the labels.
        num_items: what the sum over the rows is divided by, an int or a 0-d tensor; at least 1 is used. Default: K.
        loss_type: "nll", or "dft", each row's loss times the detached probability of its label (arXiv:2508.05629).
        label_smoothing: the share of the target spread evenly over the vocabulary, as in `F.cross_entropy`.
        return_stats: return `(loss, Stats)`.

    Returns:
        The loss, 0-d fp32 (fp64 for fp64); zero, with zero gradients, where no row is kept.

    Gradients are made here, in the forward pass, the head's summed over chunks in fp32, and are scaled in the backward
    pass. That may work in place: a second backward raises then.

    A label outside [0, V) in a kept row makes the loss NaN on a GPU and raises on a CPU.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown `loss_type`, "dft" with label smoothing.
    """
    if loss_type not in ("nll", "dft"):
        raise ValueError(f"loss_type is {loss_type!r}; choose 'nll' or 'dft'.")
    if loss_type == "dft" and label_smoothing:
        raise ValueError("loss_type='dft' has no label smoothing; set label_smoothing to 0.")
    if isinstance(num_items, Tensor) and num_items.ndim:
        raise ValueError(f"num_items has shape {tuple(num_items.shape)}; give an int or a 0-d tensor.")
    hidden_NH, labels_N, rows_K, dtype = _flatten(hidden, weight, labels, bias, rows, ignore_index)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss_sum, *stats, _, _, _ = _linear_cross_entropy_op(
        hidden_NH, weight, bias, labels_N, rows_K, None,
        dtype, logit_scale, softcap, label_smoothing, loss_type == "dft", return_stats, *needs,
    )  # fmt: skip
    if isinstance(num_items, Tensor):
        loss = loss_sum / num_items.to(loss_sum.dtype).clamp(min=1)
    else:
        loss = loss_sum / max(1, len(rows_K) if num_items is None else num_items)
    return (loss, Stats(*stats)) if return_stats else loss


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probabilities of the kept rows' labels, [K] fp32, for losses that weight each token in their own way.

    The arguments are those of `linear_cross_entropy`. The gradient of each row may be anything, so it is made in the backward
    pass, where the logits of each chunk are computed again.
    """
    hidden_NH, labels_N, rows_K, dtype = _flatten(hidden, weight, labels, bias, rows, ignore_index)
    return _linear_log_probs_op(hidden_NH, weight, bias, labels_N, rows_K, dtype, logit_scale, softcap)


def _flatten(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """hidden_NH, labels_N, rows_K and the dtype of the products."""
    if labels.shape != hidden.shape[:-1] or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, labels))
        raise ValueError(f"hidden, weight and labels have shapes {shapes}; they must be [..., H], [V, H] and [...].")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}], one value a vocabulary entry."
        )
    if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64):
        raise ValueError(f"rows is {rows.dtype} of shape {tuple(rows.shape)}; it must be int64 of shape [K].")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    elif hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    else:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one of them or use torch.autocast."
        )
    labels_N = labels.reshape(-1)
    rows_K = (labels_N != ignore_index).nonzero().squeeze(1) if rows is None else rows
    return hidden.reshape(-1, hidden.shape[-1]), labels_N, rows_K, dtype


# ---------------------------------------------------------------------------------------------------------------------
# Reference


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    num_items: int | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    loss_type: str = "nll",
    ignore_index: int = -100,
) -> tuple[Tensor, Stats]:
    """`linear_cross_entropy` with the full logits and PyTorch's own gradients; `(loss, Stats)`."""
    labels_N = labels.reshape(-1)
    rows_K = (labels_N != ignore_index).nonzero().squeeze(1) if rows is None else rows
    targets_K = labels_N[rows_K]
    logits_KV = F.linear(hidden.reshape(-1, hidden.shape[-1])[rows_K], weight, bias)
    logits_KV = _final_logits_torch(logits_KV, None, logit_scale, softcap)
    nll_K = F.cross_entropy(logits_KV, targets_K, reduction="none")
    loss_K = F.cross_entropy(logits_KV, targets_K, reduction="none", label_smoothing=label_smoothing)
    if loss_type == "dft":
        loss_K = loss_K * (-nll_K).exp().detach()
    num_items = len(rows_K) if num_items is None else num_items
    loss = loss_K.sum() / torch.as_tensor(num_items, device=loss_K.device).clamp(min=1)
    entropy_K = torch.distributions.Categorical(logits=logits_KV.detach(), validate_args=False).entropy()
    return loss, Stats(nll_K.detach(), entropy_K, logits_KV.argmax(-1) == targets_K)
