"""What the kernels share that make a sum of products in one launch on Hopper: tiles by TMA, and what is added to them.

Letters of tensor shapes: T rows (tokens), N columns of the result, K what a product sums over, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from truetune.ops.backend import by_tma, next_power_of_2, tl, triton
from truetune.ops.low_rank import LowRank

# ----------------------------------------------------------------------------------------------------------------------
# Parts of Triton kernels

if triton is not None:

    @triton.jit
    def place_of(tile, T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
        """The first row and column of a tile; GROUP tiles of rows go through the columns together, so that what is in
        the cache is used again."""
        blocks_t, blocks_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
        group, place = tile // (GROUP * blocks_n), tile % (GROUP * blocks_n)
        height = min(blocks_t - group * GROUP, GROUP)
        return (group * GROUP + place % height) * BLOCK_T, place // height * BLOCK_N

    @triton.jit
    def add_product(out, a_desc, b_desc, t, n, K, BY_K: tl.constexpr, BLOCK_K: tl.constexpr):
        """out + a @ b, where b lies as [K, N], or else as [N, K]."""
        for k in range(0, K, BLOCK_K):
            if BY_K:
                b = b_desc.load([k, n])
            else:
                b = b_desc.load([n, k]).T
            out = tl.dot(a_desc.load([t, k]), b, out)
        return out

    @triton.jit
    def add_low_rank(
        out, x_desc, adapter_desc, t, n, RANK: tl.constexpr, ADAPTER_BY_RANK: tl.constexpr, BLOCK_R: tl.constexpr
    ):
        """out + x @ b.T, where b lies as [R, N], or else as [N, R]. Unrolled: of two loops none could be flattened."""
        for start in tl.static_range(0, RANK, BLOCK_R):
            if ADAPTER_BY_RANK:
                adapter = adapter_desc.load([start, n])
            else:
                adapter = adapter_desc.load([n, start]).T
            out = tl.dot(x_desc.load([t, start]), adapter, out)
        return out

    @triton.jit
    def store_sum(out, add_desc, out_desc, t, n, HAS_ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
        """Stores out, and what is to be added, in two halves, which need half of the shared memory."""
        left, right = out.reshape(BLOCK_T, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        if HAS_ADD:
            left += add_desc.load([t, n]).to(tl.float32)
        out_desc.store([t, n], left.to(tl.bfloat16))
        if HAS_ADD:
            right += add_desc.load([t, n + BLOCK_N // 2]).to(tl.float32)
        out_desc.store([t, n + BLOCK_N // 2], right.to(tl.bfloat16))


# ----------------------------------------------------------------------------------------------------------------------
# Their operands


def tiles_of(tensor: Tensor, *block: int) -> Any:
    """What a kernel loads tiles of `block` from, or stores them to: a matrix for which `by_tma` holds."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(tensor, list(block))


def adapter_fits(low_rank: LowRank | None) -> bool:
    """b is copied where it must be: a row of it is as long as the rank, or as the result is wide."""
    if low_rank is None:
        return True
    x_TR, b_NR = low_rank
    return x_TR.dtype == torch.bfloat16 and by_tma(x_TR) and b_NR.shape[0] % 8 == 0 and b_NR.shape[1] % 8 == 0


def adapter_tiles(low_rank: LowRank | None, block_t: int, block_n: int, largest: int) -> tuple[Any, Any, dict]:
    """x's, b's, and the constants of `add_low_rank`; b is rounded to the dtype of x."""
    if low_rank is None:
        return None, None, {"RANK": 0, "ADAPTER_BY_RANK": False, "BLOCK_R": 16}
    x_TR, b_NR = low_rank
    rank, by_rank = b_NR.shape[1], b_NR.stride(1) != 1
    block_r = min(largest, max(16, next_power_of_2(rank)))
    adapter = b_NR.to(x_TR.dtype)
    adapter = adapter.t() if by_rank else adapter
    if not by_tma(adapter):
        adapter = adapter.clone(memory_format=torch.contiguous_format)
    blocks = (block_r, block_n) if by_rank else (block_n, block_r)
    constants = {"RANK": rank, "ADAPTER_BY_RANK": by_rank, "BLOCK_R": block_r}
    return tiles_of(x_TR, block_t, block_r), tiles_of(adapter, *blocks), constants
