"""Sums of products in bf16 with an adapter's product and a residual, rounded once: on Hopper, in one launch.

cuBLAS adds to what lies in the result, and so the adapter's part is written there first: a pass over the result, and a
GEMM that is a fifth slower for reading it. Here its few ranks are a last step of the sum, and the gradients through
several linears that share their input are one sum too.

Letters of tensor shapes: T rows (tokens), N columns of the result, K what a product sums over, R rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from truetune.ops.backend import by_tma, cdiv, compute_capability, num_multiprocessors, tl, triton, use_kernels
from truetune.ops.low_rank import LowRank
from truetune.ops.tiles import adapter_fits, adapter_tiles, tiles_of

_BLOCK_T, _BLOCK_N, _BLOCK_K, _NUM_WARPS, _GROUP = 128, 256, 64, 8, 8
_LARGEST_BLOCK_R = 32
_MAX_PRODUCTS = 3
_LEAST_FLOPS = 3e10  # below, the launch costs the host more than the sum saves the device
_LONGEST_FLAT = 3072  # up to this K a tile's first loads should not wait for the tile before it

Product = tuple[Tensor, Tensor]  # x_TK and b_KN, for x @ b

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:
    from truetune.ops.tiles import add_low_rank, add_product, place_of, store_sum

    @triton.jit(do_not_specialize=["T", "programs"])
    def _dense_sum_kernel(
        a0_desc, b0_desc, a1_desc, b1_desc, a2_desc, b2_desc, x_desc, adapter_desc, add_desc, out_desc,
        T, N, K0, K1, K2, programs,
        PRODUCTS: tl.constexpr, BY_K: tl.constexpr, RANK: tl.constexpr, ADAPTER_BY_RANK: tl.constexpr,
        HAS_ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_R: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
    ):  # fmt: skip
        tiles = tl.cdiv(T, BLOCK_T) * tl.cdiv(N, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
            t, n = place_of(tile, T, N, BLOCK_T, BLOCK_N, GROUP)
            out = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            out = add_product(out, a0_desc, b0_desc, t, n, K0, BY_K, BLOCK_K)
            if PRODUCTS > 1:
                out = add_product(out, a1_desc, b1_desc, t, n, K1, BY_K, BLOCK_K)
            if PRODUCTS > 2:
                out = add_product(out, a2_desc, b2_desc, t, n, K2, BY_K, BLOCK_K)
            out = add_low_rank(out, x_desc, adapter_desc, t, n, RANK, ADAPTER_BY_RANK, BLOCK_R)
            store_sum(out, add_desc, out_desc, t, n, HAS_ADD, BLOCK_T, BLOCK_N)


# ----------------------------------------------------------------------------------------------------------------------
# Launcher


def sums_in_one_launch(products: Sequence[Product], low_rank: LowRank | None, add_TN: Tensor | None) -> bool:
    """Whether `dense_sum` takes these, and is worth it: on Hopper, in bf16, where there is more than one term."""
    first, b_KN = products[0]
    if not use_kernels(first) or len(products) > _MAX_PRODUCTS:
        return False
    if first.is_cuda:
        flops = 2 * len(first) * b_KN.shape[1] * sum(x_TK.shape[1] for x_TK, _ in products)
        if compute_capability(first.device) != (9, 0) or flops < _LEAST_FLOPS:
            return False
    if len(first) == 0 or b_KN.shape[1] % 8 != 0 or (len(products) == 1 and low_rank is None and add_TN is None):
        return False  # no rows, rows of the result that TMA does not store, or a product alone
    by_k = b_KN.stride(1) == 1
    matrices = [matrix for x_TK, b in products for matrix in (x_TK, b if by_k else b.t())]
    matrices += [] if add_TN is None else [add_TN]
    return all(x.dtype == torch.bfloat16 and by_tma(x) for x in matrices) and adapter_fits(low_rank)


def dense_sum(products: Sequence[Product], *, low_rank: LowRank | None = None, add_TN: Tensor | None = None) -> Tensor:
    """All products, x @ b.T of `low_rank` and `add_TN`: [T, N] in bf16, summed in fp32 and rounded once.

    `sums_in_one_launch` has said whether this can be called. The elements of a row of b_KN are neighbours, or else
    those of a column, and in all products alike; b_NR is rounded to bf16.
    """
    (T, _), (_, N) = products[0][0].shape, products[0][1].shape
    by_k = products[0][1].stride(1) == 1
    operands: list[Any] = []
    for x_TK, b_KN in products:
        weight = tiles_of(b_KN, _BLOCK_K, _BLOCK_N) if by_k else tiles_of(b_KN.t(), _BLOCK_N, _BLOCK_K)
        operands += [tiles_of(x_TK, _BLOCK_T, _BLOCK_K), weight]
    widths = [x_TK.shape[1] for x_TK, _ in products]
    missing = _MAX_PRODUCTS - len(products)
    x_tiles, b_tiles, adapter = adapter_tiles(low_rank, _BLOCK_T, _BLOCK_N, _LARGEST_BLOCK_R)
    out_TN = products[0][0].new_empty((T, N))
    num_tiles = cdiv(T, _BLOCK_T) * cdiv(N, _BLOCK_N)
    programs = min(num_tiles, num_multiprocessors(out_TN.device))
    flat = len(products) == 1 and widths[0] <= _LONGEST_FLAT and adapter["RANK"] <= adapter["BLOCK_R"]
    with torch.cuda.device_of(out_TN):
        _dense_sum_kernel[(programs,)](
            *operands, *[None] * 2 * missing, x_tiles, b_tiles,
            None if add_TN is None else tiles_of(add_TN, _BLOCK_T, _BLOCK_N // 2),
            tiles_of(out_TN, _BLOCK_T, _BLOCK_N // 2),
            T, N, *widths, *[0] * missing, programs,
            PRODUCTS=len(products), BY_K=by_k, HAS_ADD=add_TN is not None,
            BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, GROUP=_GROUP, FLATTEN=flat,
            num_warps=_NUM_WARPS, num_stages=num_stages(flat), **adapter,
        )  # fmt: skip
    return out_TN


def num_stages(flat: bool) -> int:
    """How many tiles of each operand are in shared memory. What the adapter takes of it is free before the next tile's
    loads begin, but not in a flat loop."""
    return 3 if flat else 4
