"""Rows times a scalar, put where they belong: the last step of a gradient that was made before its scale was known.

Letters of tensor shapes: K rows, N rows of the result, H row length.
"""

import torch
from torch import Tensor

from truetune.ops.backend import cdiv, next_power_of_2, tl, triton, use_kernels

if triton is not None:

    @triton.jit
    def _scale_rows_kernel(
        x_ptr, rows_ptr, scale_ptr, out_ptr, K, H,
        HAS_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]
        col = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
        mask = (row < K) & (col < H)
        x = tl.load(x_ptr + row * H + col, mask=mask).to(tl.float32) * tl.load(scale_ptr)
        if HAS_ROWS:
            row = tl.load(rows_ptr + row, mask=row < K, other=0)
        tl.store(out_ptr + row * H + col, x.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(x_KH: Tensor, scale: Tensor, rows_K: Tensor | None, out_NH: Tensor) -> None:
    K, H = x_KH.shape
    block_h = min(4096, next_power_of_2(H))
    block_k = 4096 // block_h
    with torch.cuda.device_of(x_KH):
        _scale_rows_kernel[(cdiv(K, block_k), cdiv(H, block_h))](
            x_KH, rows_K, scale, out_NH, K, H,
            HAS_ROWS=rows_K is not None, BLOCK_K=block_k, BLOCK_H=block_h, num_warps=8,
        )  # fmt: skip


@torch.library.custom_op("truetune::scale_rows", mutates_args=())
def scale_rows(x_KH: Tensor, scale: Tensor, rows_K: Tensor | None, num_rows: int, dtype: torch.dtype) -> Tensor:
    """out[rows_K] = x_KH * scale and zeros elsewhere; out is [num_rows, H] of `dtype`. Without rows_K: rows in order.

    The product is taken in the dtype of the 0-d scale (fp32 on a GPU) and rounded once; PyTorch's own product would
    round a 0-d scale to the dtype of x first. No row may be named twice. Not differentiable.
    """
    if not use_kernels(x_KH):
        return scale_rows_reference(x_KH, scale, rows_K, num_rows, dtype)
    new = x_KH.new_empty if rows_K is None else x_KH.new_zeros
    out_NH = new((num_rows, x_KH.shape[1]), dtype=dtype)
    if len(x_KH) > 0:
        _launch(x_KH, scale, rows_K, out_NH)
    return out_NH


@scale_rows.register_fake
def _(x_KH, scale, rows_K, num_rows, dtype):
    return x_KH.new_empty((num_rows, x_KH.shape[1]), dtype=dtype)


def scale_rows_reference(x_KH, scale, rows_K, num_rows, dtype) -> Tensor:
    """`scale_rows` in plain PyTorch."""
    scaled_KH = (x_KH.to(scale.dtype) * scale).to(dtype, copy=True)
    return (
        scaled_KH
        if rows_K is None
        else x_KH.new_zeros((num_rows, x_KH.shape[1]), dtype=dtype).index_copy_(0, rows_K, scaled_KH)
    )
