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
    num_multiprocessors,
    tl,
    triton,
    use_kernels,
)
from truetune.ops.fp8 import Fp8Product, scaled_product
from truetune.ops.low_rank import LowRank, low_rank_product
from truetune.ops.tiles import adapter_fits, adapter_tiles, tiles_of

_BLOCK_T, _BLOCK_N, _BLOCK_K, _NUM_WARPS, _NUM_STAGES = 128, 256, 128, 8, 3
_LARGEST_BLOCK_R = 64  # with 3 stages, 224 of the 227 KiB of shared memory
_GROUP = 16
_MAX_PRODUCTS = 3

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:
    from truetune.ops.tiles import add_low_rank, add_product, place_of, store_sum

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
    def _add_next_product(
        out, a_scale, b_scale, a_largest, b_largest, a_desc, b_desc, a_scale_ptr, b_scale_ptr, t, n, row, col, T, N, K,
        BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        a_scale, a_factor, a_largest = _in_units_of(a_scale_ptr, a_scale, a_largest, row, T)
        b_scale, b_factor, b_largest = _in_units_of(b_scale_ptr, b_scale, b_largest, col, N)
        out = add_product(out * (a_factor[:, None] * b_factor[None, :]), a_desc, b_desc, t, n, K, False, BLOCK_K)
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
            t, n = place_of(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
            row, col = t + tl.arange(0, BLOCK_T), n + tl.arange(0, BLOCK_N)

            out = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            out = add_product(out, a0_desc, b0_desc, t, n, K0, False, BLOCK_K)
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

            out = add_low_rank(out, x_desc, adapter_desc, t, n, RANK, ADAPTER_BY_RANK, BLOCK_R)
            store_sum(out, add_desc, out_desc, t, n, HAS_ADD, BLOCK_T, BLOCK_N)


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
    return adapter_fits(low_rank)


def _launch(products: Sequence[Fp8Product], low_rank: LowRank | None, add_TN: Tensor | None, out_TN: Tensor) -> None:
    T, N = out_TN.shape
    operands: list[Any] = []
    for a8_TK, scale_T, b8_NK, scale_1N in products:
        operands += [tiles_of(a8_TK, _BLOCK_T, _BLOCK_K), tiles_of(b8_NK, _BLOCK_N, _BLOCK_K), scale_T, scale_1N]
    widths = [product.a8_TK.shape[1] for product in products]
    missing = _MAX_PRODUCTS - len(products)
    x_tiles, b_tiles, adapter = adapter_tiles(low_rank, _BLOCK_T, _BLOCK_N, _LARGEST_BLOCK_R)
    num_tiles = cdiv(T, _BLOCK_T) * cdiv(N, _BLOCK_N)
    programs = min(num_tiles, num_multiprocessors(out_TN.device))
    with torch.cuda.device_of(out_TN):
        _fp8_sum_kernel[(programs,)](
            *operands, *[None] * 4 * missing,
            x_tiles, b_tiles,
            None if add_TN is None else tiles_of(add_TN, _BLOCK_T, _BLOCK_N // 2),
            tiles_of(out_TN, _BLOCK_T, _BLOCK_N // 2),
            T, N, *widths, *[0] * missing, programs,
            PRODUCTS=len(products), HAS_ADD=add_TN is not None,
            BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, GROUP=_GROUP,
            # A tile's first loads do not wait for the tile before it; only one loop inside can be flattened.
            FLATTEN=len(products) == 1 and adapter["RANK"] <= adapter["BLOCK_R"],
            **adapter,
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
