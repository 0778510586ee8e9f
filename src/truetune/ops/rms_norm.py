"""RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019) with what stands around it in a model.

y = x / sqrt(mean(x^2) + eps) * (offset + weight), with an offset of 1 in Gemma's models, in fp32 and rounded once.
Forward also adds: before the norm, what comes into the residual stream, or after it the residual stream itself (Gemma 2
and 3, OLMo 2); and gives y in FP8 for the GEMM that comes next. Backward sums the gradients of up to three readers of y
and adds the gradient that came down the residual stream. Either is one launch; a weight's gradient takes one more.

Saved for backward: x (or x + added), and one fp32 number a row.

Letters of tensor shapes: T rows, H row length.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.ops.backend import next_power_of_2, num_multiprocessors, tl, triton, use_kernels
from truetune.ops.fp8 import FP8, quantize_rows_reference

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    from truetune.ops.fp8 import row_scale

    @triton.jit(do_not_specialize=["T"])  # no kernel of its own for batches whose length 16 divides
    def _rms_norm_forward_kernel(
        x_ptr, weight_ptr, added_ptr, residual_ptr, y_ptr, rstd_ptr, sum_ptr, y8_ptr, scale_ptr,
        x_stride, added_stride, residual_stride, T, H, eps, offset,
        ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """One program for ROWS whole rows, which stay in registers between the sum and the product."""
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        col = tl.arange(0, BLOCK_H)[None, :]
        mask = (row[:, None] < T) & (col < H)
        out = row[:, None] * H + col
        x = tl.load(x_ptr + row[:, None] * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        if added_ptr is not None:
            x += tl.load(added_ptr + row[:, None] * added_stride + col, mask=mask, other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + out, rounded, mask=mask)
            x = rounded.to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
        tl.store(rstd_ptr + row, rstd, mask=row < T)
        y = x * rstd[:, None] * (offset + tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32))
        if residual_ptr is not None:
            y += tl.load(residual_ptr + row[:, None] * residual_stride + col, mask=mask, other=0.0).to(tl.float32)
        rounded_y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + out, rounded_y, mask=mask)
        if y8_ptr is not None:
            y = rounded_y.to(tl.float32)
            scale, inverse = row_scale(tl.max(tl.abs(y), 1))
            tl.store(scale_ptr + row, scale, mask=row < T)
            tl.store(y8_ptr + out, (y * inverse[:, None]).to(tl.float8e4nv), mask=mask)

    @triton.jit(do_not_specialize=["T"])
    def _rms_norm_backward_kernel(
        dy_ptr, dy_b_ptr, dy_c_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, dx_ptr, dweight_ptr,
        dy_stride, dy_b_stride, dy_c_stride, x_stride, dresidual_stride, dx_stride, T, H, offset,
        ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """A program goes through the rows in steps of the grid, and sums its part of the weight's gradient on the way.

        dx may be dresidual: an element is stored by who loaded it.
        """
        col = tl.arange(0, BLOCK_H)[None, :]
        weight = offset + tl.load(weight_ptr + col, mask=col < H, other=0.0).to(tl.float32)
        dweight = tl.zeros([ROWS, BLOCK_H], tl.float32)
        for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
            row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            mask = (row < T) & (col < H)
            rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
            x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
            if dy_b_ptr is not None:
                dy += tl.load(dy_b_ptr + row * dy_b_stride + col, mask=mask, other=0.0).to(tl.float32)
            if dy_c_ptr is not None:
                dy += tl.load(dy_c_ptr + row * dy_c_stride + col, mask=mask, other=0.0).to(tl.float32)
            normed = x * rstd
            scaled = dy * weight
            dx = (scaled - normed * (tl.sum(scaled * normed, 1) / H)[:, None]) * rstd
            if dresidual_ptr is not None:
                dx += tl.load(dresidual_ptr + row * dresidual_stride + col, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * dx_stride + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if dweight_ptr is not None:
                dweight += dy * normed
        if dweight_ptr is not None:
            tl.store(dweight_ptr + tl.program_id(0) * H + col, tl.sum(dweight, 0)[None, :], mask=col < H)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


class Normed(NamedTuple):
    """What the forward pass gives: y; 1 / rms [T], for backward; x + added; y in FP8 and its scales [T].

    The last three are None unless asked for.
    """

    y: Tensor
    rstd_T: Tensor
    sum_TH: Tensor | None = None
    y8: Tensor | None = None
    scale_T: Tensor | None = None


@cache
def _tile(H: int, elements: int) -> tuple[int, int, int]:
    """ROWS, BLOCK_H and the warps, each thread of which holds 16 elements of a tensor."""
    block_h = next_power_of_2(H)
    rows = max(1, elements // block_h)
    return rows, block_h, min(32, max(4, rows * block_h // 512))


def _launch_forward(x_TH, weight_H, eps, offset, residual_TH, added_TH, done: Normed) -> None:
    T, H = x_TH.shape
    rows, block_h, num_warps = _tile(H, 2048)
    with torch.cuda.device_of(x_TH):
        _rms_norm_forward_kernel[(-(-T // rows),)](
            x_TH, weight_H, added_TH, residual_TH, *done, x_TH.stride(0),
            0 if added_TH is None else added_TH.stride(0), 0 if residual_TH is None else residual_TH.stride(0),
            T, H, eps, offset, ROWS=rows, BLOCK_H=block_h, num_warps=num_warps,
        )  # fmt: skip


def _launch_backward(dys, x_TH, weight_H, rstd_T, offset, dresidual_TH, dx_TH, needs_weight) -> Tensor | None:
    """The weight's gradient."""
    T, H = x_TH.shape
    # Where sums are kept from row to row there are only as many programs as fill the GPU, each with more in flight.
    rows, block_h, num_warps = _tile(H, 4096 if needs_weight else 2048)
    programs, dweight_PH = -(-T // rows), None
    if needs_weight:
        programs = min(programs, num_multiprocessors(x_TH.device) * max(1, 32 // num_warps))
        dweight_PH = torch.empty((programs, H), dtype=torch.float32, device=x_TH.device)
    dy_a, dy_b, dy_c = dys + (None,) * (3 - len(dys))
    with torch.cuda.device_of(x_TH):
        _rms_norm_backward_kernel[(programs,)](
            dy_a, dy_b, dy_c, x_TH, weight_H, rstd_T, dresidual_TH, dx_TH, dweight_PH,
            dy_a.stride(0), 0 if dy_b is None else dy_b.stride(0), 0 if dy_c is None else dy_c.stride(0),
            x_TH.stride(0), 0 if dresidual_TH is None else dresidual_TH.stride(0), dx_TH.stride(0), T, H, offset,
            ROWS=rows, BLOCK_H=block_h, num_warps=num_warps,
        )  # fmt: skip
        return None if dweight_PH is None else dweight_PH.sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


def rms_norm_forward(
    x_TH: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0, residual_TH: Tensor | None = None,
    added_TH: Tensor | None = None, out_dtype: torch.dtype | None = None, quantize: bool = False,
) -> Normed:  # fmt: skip
    """y = x * rsqrt(mean(x^2) + eps) * (offset + weight), in fp32, rounded once to `out_dtype` (x's, if not given).

    With `added_TH`, what is normalised is x + added, rounded to x's dtype and returned; it is what backward takes for
    x. With `residual_TH`, y is residual + the above, in residual's dtype. With `quantize`, y8 and scale are
    `quantize_rows(y)`, to the bit.

    Tensors may differ in dtype. The last dimension is contiguous, rows of inputs may be strided; outputs are contiguous
    and new. Not differentiable.
    """
    if not use_kernels(x_TH):
        return _forward_torch(x_TH, weight_H, eps, offset, residual_TH, added_TH, out_dtype, quantize)
    shape, device = x_TH.shape, x_TH.device
    if residual_TH is not None:
        out_dtype = residual_TH.dtype
    done = Normed(
        torch.empty(shape, dtype=out_dtype or x_TH.dtype, device=device),
        torch.empty(shape[:1], dtype=torch.float32, device=device),
        None if added_TH is None else torch.empty(shape, dtype=x_TH.dtype, device=device),
        torch.empty(shape, dtype=FP8, device=device) if quantize else None,
        torch.empty(shape[:1], dtype=torch.float32, device=device) if quantize else None,
    )
    if shape[0]:
        _launch_forward(x_TH, weight_H, eps, offset, residual_TH, added_TH, done)
    return done


def rms_norm_backward(
    dy: Tensor | tuple[Tensor, ...], x_TH: Tensor, weight_H: Tensor, rstd_T: Tensor, *, offset: float = 0.0,
    dresidual_TH: Tensor | None = None, needs_weight: bool = False, out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dx_TH in x's dtype, dweight_H in fp32 or None), where y = norm(x) and `dy` is a gradient or up to three to add.

    dx includes `dresidual_TH`; it is written to `out` if given, which may be dresidual itself. The last dimension of
    every tensor is contiguous, rows may be strided. dweight is the same in every run.
    """
    dys = dy if isinstance(dy, tuple) else (dy,)
    if not use_kernels(x_TH):
        return _backward_torch(dys, x_TH, weight_H, rstd_T, offset, dresidual_TH, needs_weight, out)
    dx_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device) if out is None else out
    if x_TH.shape[0]:
        return dx_TH, _launch_backward(dys, x_TH, weight_H, rstd_T, offset, dresidual_TH, dx_TH, needs_weight)
    return dx_TH, torch.zeros_like(weight_H, dtype=torch.float32) if needs_weight else None


# ----------------------------------------------------------------------------------------------------------------------
# Public function


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH, weight_H, eps, offset, out_dtype) -> Tensor:
        y_TH, rstd_T, *_ = rms_norm_forward(x_TH, weight_H, eps, offset=offset, out_dtype=out_dtype)
        ctx.save_for_backward(x_TH, weight_H, rstd_T)
        ctx.offset = offset
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH):
        x_TH, weight_H, rstd_T = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        dx_TH, dweight_H = rms_norm_backward(
            dy_TH.contiguous(), x_TH, weight_H, rstd_T, offset=ctx.offset, needs_weight=needs_weight
        )
        return dx_TH, None if dweight_H is None else dweight_H.to(weight_H.dtype), None, None, None


def rms_norm(
    x: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x [..., H] -> x * rsqrt(mean(x^2) + eps) * (offset + weight), in `out_dtype` (x's, if not given).

    Differentiable once.
    """
    return _RmsNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight_H, eps, offset, out_dtype).view(x.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Reference


def rms_norm_reference(x: Tensor, weight_H: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """`rms_norm` as PyTorch would do it, differentiated by autograd."""
    z, weight_H = (tensor.to(_precise(x.dtype)) for tensor in (x, weight_H))
    return (z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * (offset + weight_H)).to(x.dtype)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward_torch(x_TH, weight_H, eps, offset, residual_TH, added_TH, out_dtype, quantize) -> Normed:
    """`rms_norm_forward` in plain PyTorch."""
    precise = _precise(x_TH.dtype)
    sum_TH = None if added_TH is None else (x_TH.to(precise) + added_TH).to(x_TH.dtype)
    x = (x_TH if sum_TH is None else sum_TH).to(precise)
    rstd_T = torch.rsqrt(x.square().mean(-1) + eps)
    y = x * rstd_T[:, None] * (offset + weight_H.to(precise))
    if residual_TH is not None:
        y, out_dtype = y + residual_TH, residual_TH.dtype
    y = y.to(out_dtype or x_TH.dtype)
    y8, scale_T = quantize_rows_reference(y) if quantize else (None, None)
    return Normed(y, rstd_T, sum_TH, y8, scale_T)


def _backward_torch(
    dys, x_TH, weight_H, rstd_T, offset, dresidual_TH, needs_weight, out
) -> tuple[Tensor, Tensor | None]:
    """`rms_norm_backward` in plain PyTorch."""
    precise = _precise(x_TH.dtype)
    dy = sum(dy.to(precise) for dy in dys)
    normed = x_TH.to(precise) * rstd_T[:, None]
    scaled = dy * (offset + weight_H.to(precise))
    dx = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd_T[:, None]
    if dresidual_TH is not None:
        dx = dx + dresidual_TH
    dx_TH = dx.to(x_TH.dtype) if out is None else out.copy_(dx)
    return dx_TH, (dy * normed).sum(0) if needs_weight else None
