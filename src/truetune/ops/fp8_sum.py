"""Sums of products in FP8 with an adapter's product and a residual, rounded once.

On Hopper one kernel makes the sum where it makes the products, in about the time that cuBLASLt takes for the products
alone; their results would otherwise be written, read and written again, 61 of the 754 ms of an 8B step on an H100
(benchmarks/bench_fp8_sum.py). It is persistent, and its operands come by TMA, those of the adapter too: through
pointers they cost a tenth of the time. Elsewhere each product is made by itself, and one pass adds them.

Letters of tensor shapes: T rows (tokens), N columns of the result, K what a product sums over, R rank.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.ops.backend import (
    by_tma,
    cdiv,
    compute_capability,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
    use_kernels,
)
from truetune.ops.fp8 import Fp8Product, scaled_product
from truetune.ops.low_rank import LowRank, low_rank_product

_BLOCK_T, _BLOCK_N, _BLOCK_K, _NUM_WARPS, _NUM_STAGES = 128, 256, 128, 8, 3
_LARGEST_BLOCK_R = 64  # with 3 stages, 224 of the 227 KiB of shared memory
_GROUP = 16  # tiles of rows that go through the columns together, so that what is in the cache is used again
_MAX_PRODUCTS = 3

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:
    _LEAST_RATIO = tl.constexpr(2.0**-40)

    @triton.jit
    def _in_units_of(next_ptr, scale, largest, index, size):
        """The next product's scales, what turns a sum in units of the last one's into theirs, and the largest so far.

        A scale is taken as at least 2^-40 of the largest, so that no sum overflows where the next row is zero: over all
        steps it grows by 2^80 at most, from less than 2^32. What a row holds is then made too large only where its own
        scale is smaller than that, and shows only where the scales of the other side make up for it.
        """
        next_scale = tl.maximum(tl.load(next_ptr + index, mask=index < size, other=1.0), largest * _LEAST_RATIO)
        return next_scale, scale / next_scale, tl.maximum(largest, next_scale)

    @triton.jit
    def _add_product(out, a_desc, b_desc, t, n, K, BLOCK_K: tl.constexpr):
        for k in range(0, K, BLOCK_K):
            out = tl.dot(a_desc.load([t, k]), b_desc.load([n, k]).T, out)
        return out

    @triton.jit
    def _add_next_product(
        out, a_scale, b_scale, a_largest, b_largest, a_desc, b_desc, a_scale_ptr, b_scale_ptr, t, n, row, col, T, N, K,
        BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        a_scale, a_factor, a_largest = _in_units_of(a_scale_ptr, a_scale, a_largest, row, T)
        b_scale, b_factor, b_largest = _in_units_of(b_scale_ptr, b_scale, b_largest, col, N)
        out = _add_product(out * (a_factor[:, None] * b_factor[None, :]), a_desc, b_desc, t, n, K, BLOCK_K)
        return out, a_scale, b_scale, a_largest, b_largest

    @triton.jit(do_not_specialize=["T", "programs"])
    def _fp8_sum_kernel(
        a0_desc, b0_desc, a0_scale_ptr, b0_scale_ptr, a1_desc, b1_desc, a1_scale_ptr, b1_scale_ptr,
        a2_desc, b2_desc, a2_scale_ptr, b2_scale_ptr, x_desc, adapter_desc, add_desc, out_desc,
        T, N, K0, K1, K2, programs,
        PRODUCTS: tl.constexpr, RANK: tl.constexpr, ADAPTER_BY_RANK: tl.constexpr, HAS_ADD: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
        GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    ):  # fmt: skip
        blocks_t, blocks_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), blocks_t * blocks_n, programs, flatten=FLATTEN):
            group, place = tile // (GROUP * blocks_n), tile % (GROUP * blocks_n)
            height = min(blocks_t - group * GROUP, GROUP)
            t, n = (group * GROUP + place % height) * BLOCK_T, place // height * BLOCK_N
            row, col = t + tl.arange(0, BLOCK_T), n + tl.arange(0, BLOCK_N)

            out = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            out = _add_product(out, a0_desc, b0_desc, t, n, K0, BLOCK_K)
            a_scale = tl.load(a0_scale_ptr + row, mask=row < T, other=1.0)
            b_scale = tl.load(b0_scale_ptr + col, mask=col < N, other=1.0)
            a_largest, b_largest = a_scale, b_scale
            if PRODUCTS > 1:
                out, a_scale, b_scale, a_largest, b_largest = _add_next_product(
                    out, a_scale, b_scale, a_largest, b_largest,
                    a1_desc, b1_desc, a1_scale_ptr, b1_scale_ptr, t, n, row, col, T, N, K1, BLOCK_K,
                )  # fmt: skip
            if PRODUCTS > 2:
                out, a_scale, b_scale, a_largest, b_largest = _add_next_product(
                    out, a_scale, b_scale, a_largest, b_largest,
                    a2_desc, b2_desc, a2_scale_ptr, b2_scale_ptr, t, n, row, col, T, N, K2, BLOCK_K,
                )  # fmt: skip
            out = out * a_scale[:, None] * b_scale[None, :]  # not by their product, which may be below fp32's numbers

            for start in tl.static_range(0, RANK, BLOCK_R):
                if ADAPTER_BY_RANK:
                    adapter = adapter_desc.load([start, n])
                else:
                    adapter = adapter_desc.load([n, start]).T
                out = tl.dot(x_desc.load([t, start]), adapter, out)
            # In two halves, which need half of the shared memory.
            left, right = out.reshape(BLOCK_T, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            if HAS_ADD:
                left += add_desc.load([t, n]).to(tl.float32)
            out_desc.store([t, n], left.to(tl.bfloat16))
            if HAS_ADD:
                right += add_desc.load([t, n + BLOCK_N // 2]).to(tl.float32)
            out_desc.store([t, n + BLOCK_N // 2], right.to(tl.bfloat16))


# ----------------------------------------------------------------------------------------------------------------------
# Launcher and plain sum


def _fits_kernel(
    products: Sequence[Fp8Product], low_rank: LowRank | None, add_TN: Tensor | None, dtype: torch.dtype
) -> bool:
    first = products[0].a8_TK
    if not use_kernels(first) or (first.is_cuda and compute_capability(first.device) != (9, 0)):
        return False
    if len(products) > _MAX_PRODUCTS or dtype != torch.bfloat16:
        return False
    if add_TN is not None and (add_TN.dtype != dtype or not by_tma(add_TN)):
        return False
    # b is copied where it must be; a row of it is as long as the rank.
    return low_rank is None or (low_rank[1].shape[1] % 8 == 0 and by_tma(low_rank[0]))


def _launch(products: Sequence[Fp8Product], low_rank: LowRank | None, add_TN: Tensor | None, out_TN: Tensor) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    def tiles(tensor: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, list(block))

    T, N = out_TN.shape
    operands: list[Any] = []
    for a8_TK, scale_T, b8_NK, scale_1N in products:
        operands += [tiles(a8_TK, _BLOCK_T, _BLOCK_K), tiles(b8_NK, _BLOCK_N, _BLOCK_K), scale_T, scale_1N]
    widths = [product.a8_TK.shape[1] for product in products]
    missing = _MAX_PRODUCTS - len(products)
    rank, block_r, by_rank, x_desc, adapter_desc = 0, 16, False, None, None
    if low_rank is not None:
        x_TR, b_NR = low_rank
        rank, by_rank = b_NR.shape[1], b_NR.stride(1) != 1
        block_r = min(_LARGEST_BLOCK_R, max(16, next_power_of_2(rank)))
        x_desc = tiles(x_TR, _BLOCK_T, block_r)
        adapter = b_NR.to(x_TR.dtype)
        adapter = adapter.t() if by_rank else adapter
        if not by_tma(adapter):
            adapter = adapter.clone(memory_format=torch.contiguous_format)
        adapter_desc = tiles(adapter, *((block_r, _BLOCK_N) if by_rank else (_BLOCK_N, block_r)))
    num_tiles = cdiv(T, _BLOCK_T) * cdiv(N, _BLOCK_N)
    programs = min(num_tiles, num_multiprocessors(out_TN.device))
    with torch.cuda.device_of(out_TN):
        _fp8_sum_kernel[(programs,)](
            *operands, *[None] * 4 * missing,
            x_desc, adapter_desc,
            None if add_TN is None else tiles(add_TN, _BLOCK_T, _BLOCK_N // 2), tiles(out_TN, _BLOCK_T, _BLOCK_N // 2),
            T, N, *widths, *[0] * missing, programs,
            PRODUCTS=len(products), RANK=rank, ADAPTER_BY_RANK=by_rank, HAS_ADD=add_TN is not None,
            BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, BLOCK_R=block_r, GROUP=_GROUP,
            # A tile's first loads do not wait for the tile before it; only one loop inside can be flattened.
            FLATTEN=len(products) == 1 and rank <= block_r,
            num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
        )  # fmt: skip


def fp8_sum(
    products: Sequence[Fp8Product],
    *,
    low_rank: LowRank | None = None,
    add_TN: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """All products, x @ b.T of `low_rank`, and `add_TN`: [T, N] in the dtype of `add_TN`, else in `dtype`.

    b is rounded to the dtype of x. Where one kernel makes the sum (Hopper, bf16, at most three products, a rank that 8
    divides) it is rounded once; elsewhere each product is rounded to `dtype`, and so is each sum where there is no
    `low_rank`.
    """
    T, N = products[0].a8_TK.shape[0], products[0].b8_NK.shape[0]
    if T and _fits_kernel(products, low_rank, add_TN, dtype):
        out_TN = torch.empty((T, N), dtype=dtype, device=products[0].a8_TK.device)
        _launch(products, low_rank, add_TN, out_TN)
        return out_TN
    parts = [scaled_product(product, out_dtype=dtype) for product in products]
    if low_rank is None:
        total = functools.reduce(Tensor.add_, parts)
        return total if add_TN is None else add_TN + total.to(add_TN.dtype)
    if add_TN is None:
        return low_rank_product(*low_rank, parts, parts[0])
    return low_rank_product(*low_rank, [add_TN, *parts], torch.empty_like(add_TN))
