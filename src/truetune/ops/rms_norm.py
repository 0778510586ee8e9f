"""RMSNorm, y = x / rms(x) * (offset + weight), with what stands beside it in a decoder layer (Zhang & Sennrich,
"Root Mean Square Layer Normalization", arXiv:1910.07467; Gemma's offset is 1).

A residual stream is added in the same pass, before the norm or after it; the result is also given in FP8 where the GEMM
behind it takes that. Everything between a load and a store is fp32. The backward pass sums partial gradients as it
loads them, and adds the gradient that came down the residual path.

Letters of tensor shapes: T rows, H columns.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.ops.backend import tl, triton, use_kernels
from truetune.ops.fp8 import FP8, quantize_rows_reference

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    from truetune.ops.fp8 import row_scale

    @triton.jit
    def _rms_norm_forward_kernel(
        x_ptr, added_ptr, weight_ptr, residual_ptr, sum_ptr, y_ptr, rstd_ptr, y8_ptr, scale_ptr,
        T, H, stride_x, eps, offset,
        HAS_ADDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, QUANTIZE: tl.constexpr, ROWS: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        col = tl.arange(0, BLOCK_H)[None, :]
        mask = (row < T) & (col < H)
        x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADDED:
            x += tl.load(added_ptr + row * H + col, mask=mask, other=0.0).to(tl.float32)
            stored = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row * H + col, stored, mask=mask)
            x = stored.to(tl.float32)
        weight = tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / H + eps)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tl.store(rstd_ptr + rows, rstd, mask=rows < T)
        y = x * rstd[:, None] * weight
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + row * H + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * H + col, y.to(y_ptr.dtype.element_ty), mask=mask)
        if QUANTIZE:
            scale, inverse = row_scale(tl.max(tl.abs(y), 1))
            tl.store(scale_ptr + rows, scale, mask=rows < T)
            tl.store(y8_ptr + row * H + col, (y * inverse[:, None]).to(tl.float8e4nv), mask=mask)

    @triton.jit
    def _rms_norm_backward_kernel(
        dy0_ptr, dy1_ptr, dy2_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, dweight_ptr,
        T, H, stride_x, offset,
        PARTS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, ROWS: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """Programs share out the tiles of rows; each keeps its own sum of the weight's gradient."""
        col = tl.arange(0, BLOCK_H)[None, :]
        weight = tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32) + offset
        dweight = tl.zeros([BLOCK_H], tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
            rows = tile * ROWS + tl.arange(0, ROWS)
            row = rows.to(tl.int64)[:, None]
            mask = (row < T) & (col < H)
            x = tl.load(x_ptr + row * stride_x + col, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy0_ptr + row * H + col, mask=mask, other=0.0).to(tl.float32)
            if PARTS > 1:
                dy += tl.load(dy1_ptr + row * H + col, mask=mask, other=0.0).to(tl.float32)
            if PARTS > 2:
                dy += tl.load(dy2_ptr + row * H + col, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + rows, mask=rows < T, other=0.0)[:, None]
            normed = x * rstd
            if NEEDS_WEIGHT:
                dweight += tl.sum(dy * normed, 0)
            dnormed = dy * weight
            dx = (dnormed - normed * (tl.sum(dnormed * normed, 1) / H)[:, None]) * rstd
            if HAS_RESIDUAL:
                dx += tl.load(dresidual_ptr + row * H + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * H + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if NEEDS_WEIGHT:
            cols = tl.arange(0, BLOCK_H)
            tl.store(dweight_ptr + tl.program_id(0) * H + cols, dweight, mask=cols < H)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers

_PROGRAMS = 264  # of a backward pass with a weight's gradient: two a multiprocessor of a Hopper GPU


def _tile(H: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps: about 16 elements a thread."""
    block_h = triton.next_power_of_2(H)
    rows = max(1, 2048 // block_h)
    return rows, block_h, min(16, max(4, rows * block_h // 512))


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


class RmsNorm(NamedTuple):
    """`y` in the asked dtype; `rstd_T` = 1 / rms in fp32 for the backward pass; the rest where it was asked for."""

    y: Tensor
    rstd_T: Tensor
    sum_TH: Tensor | None = None
    y8: Tensor | None = None
    scale_T: Tensor | None = None


def rms_norm_forward(
    x_TH: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0, residual_TH: Tensor | None = None,
    added_TH: Tensor | None = None, out_dtype: torch.dtype | None = None, quantize: bool = False,
) -> RmsNorm:  # fmt: skip
    """Normalises the rows of x, [T, H] with the last dimension contiguous.

    `added_TH`: x + added is what is normalised, and `sum_TH`, in the dtype of x. `residual_TH`: added to the result,
    which then has its dtype. `quantize`: the result also in FP8 with a scale a row (`y8`, `scale_T`).
    """
    if not use_kernels(x_TH):
        return _forward_torch(x_TH, weight_H, eps, offset, residual_TH, added_TH, out_dtype, quantize)
    T, H = x_TH.shape
    dtype = (x_TH if residual_TH is None else residual_TH).dtype if out_dtype is None else out_dtype
    y = torch.empty((T, H), dtype=dtype, device=x_TH.device)
    rstd_T = torch.empty(T, dtype=torch.float32, device=x_TH.device)
    sum_TH = None if added_TH is None else torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device)
    y8 = torch.empty((T, H), dtype=FP8, device=x_TH.device) if quantize else None
    scale_T = torch.empty_like(rstd_T) if quantize else None
    if T:
        rows, block_h, warps = _tile(H)
        with torch.cuda.device_of(x_TH):
            _rms_norm_forward_kernel[(triton.cdiv(T, rows),)](
                x_TH, added_TH, weight_H, residual_TH, sum_TH, y, rstd_T, y8, scale_T,
                T, H, x_TH.stride(0), eps, offset,
                HAS_ADDED=added_TH is not None, HAS_RESIDUAL=residual_TH is not None, QUANTIZE=quantize, ROWS=rows,
                BLOCK_H=block_h, num_warps=warps,
            )  # fmt: skip
    return RmsNorm(y, rstd_T, sum_TH, y8, scale_T)


def rms_norm_backward(
    dy: Tensor | tuple[Tensor, ...], x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor, *, offset: float = 0.0,
    dresidual_TH: Tensor | None = None, needs_weight: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dx [T, H] in the dtype of x, the weight's gradient [H] in fp32 where it is needed).

    `dy`: one gradient of the result, or up to three whose sum it is; contiguous. `dresidual_TH`: added to dx.
    """
    parts = dy if isinstance(dy, tuple) else (dy,)
    if not use_kernels(x_TH):
        return _backward_torch(parts, x_TH, weight_H, rstd_T, offset, dresidual_TH, needs_weight)
    T, H = x_TH.shape
    dx_TH = torch.empty((T, H), dtype=x_TH.dtype, device=x_TH.device)
    rows, block_h, warps = _tile(H)
    tiles = triton.cdiv(T, rows)
    programs = min(tiles, _PROGRAMS) if needs_weight else tiles
    dweight_PH = torch.empty((programs, H), dtype=torch.float32, device=x_TH.device) if needs_weight else None
    if T:
        with torch.cuda.device_of(x_TH):
            _rms_norm_backward_kernel[(programs,)](
                *parts, *[None] * (3 - len(parts)), x_TH, weight_H, rstd_T, dresidual_TH, dx_TH, dweight_PH,
                T, H, x_TH.stride(0), offset,
                PARTS=len(parts), HAS_RESIDUAL=dresidual_TH is not None, NEEDS_WEIGHT=needs_weight, ROWS=rows,
                BLOCK_H=block_h, num_warps=warps,
            )  # fmt: skip
    return dx_TH, None if dweight_PH is None else dweight_PH.sum(0)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        done = rms_norm_forward(x_TH, weight.detach(), eps, offset=offset)
        ctx.save_for_backward(x_TH, weight, done.rstd_T)
        ctx.offset = offset
        return done.y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        (dy,) = grads
        x_TH, weight, rstd_T = ctx.saved_tensors
        dx_TH, dweight = rms_norm_backward(
            dy.reshape(x_TH.shape).contiguous(), x_TH, weight.detach(), rstd_T,
            offset=ctx.offset, needs_weight=ctx.needs_input_grad[1],
        )  # fmt: skip
        return dx_TH.view(dy.shape), None if dweight is None else dweight.to(weight.dtype), None, None


# ----------------------------------------------------------------------------------------------------------------------
# Public function


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension, in the dtype of x; computed in fp32 and rounded once."""
    return _RmsNorm.apply(x, weight, eps, offset)


# ----------------------------------------------------------------------------------------------------------------------
# Plain PyTorch


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    precise = _precise(x)
    rstd = torch.rsqrt(precise.square().mean(-1, keepdim=True) + eps)
    return (precise * rstd * (offset + _precise(weight))).to(x.dtype)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _forward_torch(x_TH, weight_H, eps, offset, residual_TH, added_TH, out_dtype, quantize) -> RmsNorm:
    sum_TH = None if added_TH is None else x_TH + added_TH.to(x_TH.dtype)
    x = _precise(x_TH if sum_TH is None else sum_TH)
    rstd_T = torch.rsqrt(x.square().mean(-1) + eps)
    y = x * rstd_T[:, None] * (offset + _precise(weight_H))
    dtype = x_TH.dtype
    if residual_TH is not None:
        y, dtype = residual_TH + y, residual_TH.dtype
    y8, scale_T = quantize_rows_reference(y) if quantize else (None, None)
    return RmsNorm(y.to(out_dtype or dtype), rstd_T, sum_TH, y8, scale_T)


def _backward_torch(parts, x_TH, weight_H, rstd_T, offset, dresidual_TH, needs_weight):
    dy = sum(_precise(part) for part in parts)
    normed = _precise(x_TH) * rstd_T[:, None]
    dnormed = dy * (offset + _precise(weight_H))
    dx = (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True)) * rstd_T[:, None]
    if dresidual_TH is not None:
        dx = dx + dresidual_TH
    return dx.to(x_TH.dtype), (dy * normed).sum(0) if needs_weight else None
