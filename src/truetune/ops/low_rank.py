"""x @ b.T for a small rank, and a few tensors as large as the result: one pass over all, summed in fp32.

Letters of tensor shapes: T tokens, N output features, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from truetune.ops.backend import cdiv, next_power_of_2, tl, triton, use_kernels

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:

    @triton.jit(do_not_specialize=["T"])  # no kernel of its own for batches whose length 16 divides
    def _low_rank_product_kernel(
        x_ptr, adapter_ptr, add0_ptr, add1_ptr, add2_ptr, out_ptr, T, N,
        x_stride, adapter_stride, adapter_rank_stride, add0_stride, add1_stride, add2_stride, out_stride,
        RANK: tl.constexpr, ADDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        col = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        out = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in tl.static_range(0, RANK, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)
            x = tl.load(x_ptr + row * x_stride + rank[None, :], mask=(row < T) & (rank < RANK)[None, :], other=0.0)
            b = tl.load(
                adapter_ptr + col.to(tl.int64) * adapter_stride + rank[:, None] * adapter_rank_stride,
                mask=(col < N) & (rank < RANK)[:, None],
                other=0.0,
            )
            out = tl.dot(x, b.to(x.dtype), out, input_precision="ieee")
        mask = (row < T) & (col < N)
        if ADDS > 0:
            out += tl.load(add0_ptr + row * add0_stride + col, mask=mask, other=0.0).to(tl.float32)
        if ADDS > 1:
            out += tl.load(add1_ptr + row * add1_stride + col, mask=mask, other=0.0).to(tl.float32)
        if ADDS > 2:
            out += tl.load(add2_ptr + row * add2_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride + col, out.to(out_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Launcher and plain product


def low_rank_product(x_TR: Tensor, b_NR: Tensor, adds: Sequence[Tensor], out_TN: Tensor) -> Tensor:
    """out = x @ b.T + up to three addends, summed in fp32; b is rounded to the dtype of x on its way in. Returns out,
    which may be one of the addends."""
    if not use_kernels(x_TR):
        product_TN = matmul_fp32(x_TR, b_NR.t().to(x_TR.dtype))
        for add_TN in adds:
            product_TN += add_TN
        return out_TN.copy_(product_TN)
    (T, R), N = x_TR.shape, b_NR.shape[0]
    if T == 0:
        return out_TN
    block_t, block_n = 32, 128 if N >= 128 else 64  # small, so that many wait for memory at once
    padding = [None] * (3 - len(adds))
    with torch.cuda.device_of(x_TR):
        _low_rank_product_kernel[(cdiv(T, block_t), cdiv(N, block_n))](
            x_TR, b_NR, *adds, *padding, out_TN, T, N,
            x_TR.stride(0), b_NR.stride(0), b_NR.stride(1), *(add.stride(0) for add in adds), *([0] * len(padding)),
            out_TN.stride(0),
            RANK=R, ADDS=len(adds), BLOCK_R=min(64, max(16, next_power_of_2(R))), BLOCK_T=block_t, BLOCK_N=block_n,
            num_warps=4,
        )  # fmt: skip
    return out_TN


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed and returned in fp32 (fp64 for fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
