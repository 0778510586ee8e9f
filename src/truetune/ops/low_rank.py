"""Products of which one side is a small rank: one pass over what is large, forward and backward, summed in fp32.

Letters of tensor shapes: T tokens, K input features, N output features, R rank, S the sum of several ranks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from truetune.ops.backend import (
    cdiv,
    compute_capability,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
    use_kernels,
)

_BACKWARD_T, _BACKWARD_N, _BACKWARD_WARPS = 32, 512, 4  # tiles of dy
_SUM_BLOCK = 1024
_MOST_RANKS = 64  # a tile's sum is as wide; with more, a GEMM
_LEAST_ROWS = 4096  # one program for 64 rows
_PROJECT_T, _PROJECT_K = 64, 128  # tiles of x for x @ a.T
_OUTER_K = 64  # columns of x for d.T @ x
_MOST_OUTER = 4  # such products in one launch
_LONGEST_SUM = 4096  # rows that one program adds up: with 16,384 its error is five times cuBLAS's

LowRank = tuple[Tensor, Tensor]  # x_TR and b_NR, for x @ b.T

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

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

    @triton.jit(do_not_specialize=["T", "rows"])
    def _low_rank_backward_kernel(
        dy_ptr, adapter_ptr, x_ptr, dx_parts_ptr, db_parts_ptr, T, N, rows, dy_stride, adapter_stride, x_stride,
        RANK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    ):  # fmt: skip
        """dy is read once: a program has a block of its columns and `rows` of its rows, and writes its part of both."""
        block_n, block_rows = tl.program_id(0), tl.program_id(1)
        col, rank = block_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
        in_b = (col < N)[:, None] & (rank < RANK)[None, :]
        b = tl.load(adapter_ptr + col.to(tl.int64)[:, None] * adapter_stride + rank[None, :], mask=in_b, other=0.0)
        b = b.to(dy_ptr.dtype.element_ty)
        db = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for start in range(block_rows * rows, min(block_rows * rows + rows, T), BLOCK_T):
            row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            in_x = (row < T)[:, None] & (rank < RANK)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + rank[None, :], mask=in_x, other=0.0)
            in_dy = (row < T)[:, None] & (col < N)[None, :]
            dy = tl.load(dy_ptr + row[:, None] * dy_stride + col[None, :], mask=in_dy, other=0.0)
            db = tl.dot(dy.T, x, db)
            place = (block_n.to(tl.int64) * T + row)[:, None] * RANK + rank[None, :]
            tl.store(dx_parts_ptr + place, tl.dot(dy, b), mask=in_x)
        place = (block_rows.to(tl.int64) * N + col)[:, None] * RANK + rank[None, :]
        tl.store(db_parts_ptr + place, db, mask=in_b)

    @triton.jit(do_not_specialize=["T"])
    def _project_kernel(
        x_ptr, adapter_ptr, out_ptr, T, K, x_stride, adapter_rank_stride, adapter_stride,
        RANKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        rank = tl.arange(0, BLOCK_R)
        out = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for start in range(0, K, BLOCK_K):
            col = (start + tl.arange(0, BLOCK_K))[None, :]
            x = tl.load(x_ptr + row * x_stride + col, mask=(row < T) & (col < K), other=0.0)
            in_a = (rank < RANKS)[:, None] & (col < K)
            place_ptr = adapter_ptr + rank[:, None] * adapter_rank_stride + col.to(tl.int64) * adapter_stride
            out = tl.dot(x, tl.load(place_ptr, mask=in_a, other=0.0).to(x.dtype).T, out)
        tl.store(
            out_ptr + row * RANKS + rank[None, :],
            out.to(out_ptr.dtype.element_ty),
            mask=(row < T) & (rank < RANKS)[None, :],
        )

    @triton.jit
    def _outer_part(
        d_ptr, x_ptr, rstd_ptr, weight_ptr, parts_ptr, first, T, K, rows, d_stride, x_stride, offset,
        RANKS: tl.constexpr, BY_RANK: tl.constexpr,
        BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One product's, whose blocks of columns begin with program `first`; RANKS is 0 where it is missing."""
        block, block_rows = tl.program_id(0) - first, tl.program_id(1)
        if RANKS > 0:  # noqa: SIM102
            if (block >= 0) & (block < tl.cdiv(K, BLOCK_K)):
                col, rank = block * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
                if rstd_ptr is not None:
                    weight = offset + tl.load(weight_ptr + col, mask=col < K, other=0.0).to(tl.float32)
                total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
                for start in range(block_rows * rows, min(block_rows * rows + rows, T), BLOCK_T):
                    row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
                    in_d = (row < T)[:, None] & (rank < RANKS)[None, :]
                    d = tl.load(d_ptr + row[:, None] * d_stride + rank[None, :], mask=in_d, other=0.0)
                    in_x = (row < T)[:, None] & (col < K)[None, :]
                    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=in_x, other=0.0)
                    if rstd_ptr is not None:
                        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
                        x = x.to(tl.float32) * rstd[:, None] * weight[None, :]
                    total = tl.dot(d.T, x.to(d.dtype), total)
                place = rank[:, None] * K + col[None, :] if BY_RANK else col[None, :] * RANKS + rank[:, None]
                tl.store(parts_ptr + place, total, mask=(rank < RANKS)[:, None] & (col < K)[None, :])

    @triton.jit(do_not_specialize=["T", "rows"])
    def _outer_kernel(
        d0_ptr, x0_ptr, d1_ptr, x1_ptr, d2_ptr, x2_ptr, d3_ptr, x3_ptr, rstd_ptr, weight_ptr, parts_ptr,
        T, rows, K0, K1, K2, K3,
        d0_stride, x0_stride, d1_stride, x1_stride, d2_stride, x2_stride, d3_stride, x3_stride, offset,
        RANKS0: tl.constexpr, RANKS1: tl.constexpr, RANKS2: tl.constexpr, RANKS3: tl.constexpr, BY_RANK: tl.constexpr,
        BLOCK_R0: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T0: tl.constexpr, BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """A program has a block of columns of one x and `rows` of its rows, and writes its part of the sum. The first x
        may be normed on the way."""
        first1 = tl.cdiv(K0, BLOCK_K)
        first2 = first1 + tl.cdiv(K1, BLOCK_K)
        first3 = first2 + tl.cdiv(K2, BLOCK_K)
        part1 = RANKS0 * K0
        part2 = part1 + RANKS1 * K1
        part3 = part2 + RANKS2 * K2
        parts_ptr += tl.program_id(1).to(tl.int64) * (part3 + RANKS3 * K3)
        _outer_part(d0_ptr, x0_ptr, rstd_ptr, weight_ptr, parts_ptr, 0, T, K0, rows, d0_stride, x0_stride, offset,
                    RANKS0, BY_RANK, BLOCK_R0, BLOCK_T0, BLOCK_K)  # fmt: skip
        _outer_part(d1_ptr, x1_ptr, None, None, parts_ptr + part1, first1, T, K1, rows, d1_stride, x1_stride, 0.0,
                    RANKS1, False, BLOCK_R, BLOCK_T, BLOCK_K)  # fmt: skip
        _outer_part(d2_ptr, x2_ptr, None, None, parts_ptr + part2, first2, T, K2, rows, d2_stride, x2_stride, 0.0,
                    RANKS2, False, BLOCK_R, BLOCK_T, BLOCK_K)  # fmt: skip
        _outer_part(d3_ptr, x3_ptr, None, None, parts_ptr + part3, first3, T, K3, rows, d3_stride, x3_stride, 0.0,
                    RANKS3, False, BLOCK_R, BLOCK_T, BLOCK_K)  # fmt: skip

    @triton.jit
    def _store_sum(parts_ptr, out_ptr, parts, size, index, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], tl.float32)
        place_ptr = parts_ptr + index
        for _ in range(parts):
            total += tl.load(place_ptr, mask=index < size, other=0.0)
            place_ptr += size
        tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < size)

    @triton.jit(do_not_specialize=["dx_parts", "db_parts", "dx_blocks"])
    def _sum_parts_kernel(
        dx_parts_ptr, dx_ptr, db_parts_ptr, db_ptr, dx_parts, dx_size, db_parts, db_size, dx_blocks,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Both sums in one launch, always in the same order."""
        block = tl.program_id(0)
        if block < dx_blocks:
            _store_sum(dx_parts_ptr, dx_ptr, dx_parts, dx_size, block * BLOCK + tl.arange(0, BLOCK), BLOCK)
        else:
            index = (block - dx_blocks) * BLOCK + tl.arange(0, BLOCK)
            _store_sum(db_parts_ptr, db_ptr, db_parts, db_size, index, BLOCK)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers and plain products


def low_rank_product(x_TR: Tensor, b_NR: Tensor, adds: Sequence[Tensor], out_TN: Tensor) -> Tensor:
    """out = x @ b.T + the addends, summed in fp32, but where there are four or more all from the third on in their own
    dtype first. b is rounded to the dtype of x. Returns out, which may be one of the addends."""
    if not use_kernels(x_TR):
        product_TN = matmul_fp32(x_TR, b_NR.t().to(x_TR.dtype))
        for add_TN in adds:
            product_TN += add_TN
        return out_TN.copy_(product_TN)
    (T, R), N = x_TR.shape, b_NR.shape[0]
    if T == 0:
        return out_TN
    block_t, block_n = 32, 128 if N >= 128 else 64  # small, so that many wait for memory at once
    if len(adds) > 3:
        adds = [*adds[:2], functools.reduce(torch.add, adds[2:])]
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


def low_rank_backward(dy_TN: Tensor, b_NR: Tensor, x_TR: Tensor) -> tuple[Tensor, Tensor | None]:
    """(dy @ b [T, R] in the dtype of dy, dy.T @ x [N, R] in fp32); b is rounded to the dtype of dy.

    Both in one pass over dy where that pays: for ranks up to 32 (benchmarks/bench_low_rank.py). Elsewhere the second is
    None, which `outers` makes with others.
    """
    (T, N), R = dy_TN.shape, x_TR.shape[1]
    if not _one_pass_pays(dy_TN, b_NR, x_TR):
        return project(dy_TN, b_NR.t()), None
    blocks_n = cdiv(N, _BACKWARD_N)
    rows, splits = _splits(T, _BACKWARD_T, 2 * num_multiprocessors(dy_TN.device) // blocks_n)
    dx_TR = torch.empty((T, R), dtype=dy_TN.dtype, device=dy_TN.device)
    db_NR = torch.empty((N, R), device=dy_TN.device)
    dx_parts, db_parts = (torch.empty(shape, device=dy_TN.device) for shape in ((blocks_n, T, R), (splits, N, R)))
    dx_blocks, db_blocks = cdiv(T * R, _SUM_BLOCK), cdiv(N * R, _SUM_BLOCK)
    with torch.cuda.device_of(dy_TN):
        _low_rank_backward_kernel[(blocks_n, splits)](
            dy_TN, b_NR, x_TR, dx_parts, db_parts, T, N, rows, dy_TN.stride(0), b_NR.stride(0), x_TR.stride(0),
            RANK=R, BLOCK_R=max(16, next_power_of_2(R)), BLOCK_T=_BACKWARD_T, BLOCK_N=_BACKWARD_N,
            num_warps=_BACKWARD_WARPS, num_stages=backward_stages(compute_capability(dy_TN.device), R),
        )  # fmt: skip
        _sum_parts_kernel[(dx_blocks + db_blocks,)](
            dx_parts, dx_TR, db_parts, db_NR, blocks_n, T * R, splits, N * R, dx_blocks, BLOCK=_SUM_BLOCK
        )
    return dx_TR, db_NR


def backward_stages(capability: tuple[int, int], ranks: int) -> int:
    """How many tiles of dy are in shared memory: a third takes 7 to 9% off on an H200, and was not tried elsewhere."""
    return 3 if capability == (9, 0) and ranks <= 16 else 2


class NormedRows(NamedTuple):
    """x * rstd * (offset + weight), which `outers` makes as it reads x, the residual stream in any dtype; rstd is fp32.
    `norm(x)` is the same as a tensor, in the dtype of the linears."""

    x_TK: Tensor
    rstd_T: Tensor
    weight_K: Tensor
    offset: float
    norm: Callable[[Tensor], Tensor]

    def made(self) -> Tensor:
        return self.norm(self.x_TK)


def project(x_TK: Tensor, a_SK: Tensor) -> Tensor:
    """x @ a.T [T, S] in the dtype of x, to which a is rounded.

    On Hopper by a kernel, in 1.0 to 1.1 times cuBLAS's time, which takes 1 to 4 ms on the host for a number of rows
    that it has not met. Few rows are left to cuBLAS, whose programs share the columns.
    """
    (T, K), S = x_TK.shape, len(a_SK)
    if not _has_kernel(x_TK, S) or (x_TK.is_cuda and T < _LEAST_ROWS):
        return x_TK @ a_SK.t().to(x_TK.dtype)
    out_TS = torch.empty((T, S), dtype=x_TK.dtype, device=x_TK.device)
    with torch.cuda.device_of(x_TK):
        _project_kernel[(cdiv(T, _PROJECT_T),)](
            x_TK, a_SK, out_TS, T, K, x_TK.stride(0), a_SK.stride(0), a_SK.stride(1),
            RANKS=S, BLOCK_R=max(16, next_power_of_2(S)), BLOCK_T=_PROJECT_T, BLOCK_K=_PROJECT_K, num_warps=4,
        )  # fmt: skip
    return out_TS


def outer(d_TS: Tensor, x: Tensor | NormedRows, *, by_rank: bool = True) -> Tensor:
    """d.T @ x [S, K] in fp32 (fp64 for fp64), or, not `by_rank`, x.T @ d [K, S]; d and x are of one dtype, but for
    `NormedRows`: the gradient of A, of B, in which d is small."""
    return outers(d_TS, x, by_rank=by_rank)[0]


def outers(
    d_TS: Tensor, x: Tensor | NormedRows, others: Sequence[tuple[Tensor, Tensor]] = (), *, by_rank: bool = True
) -> list[Tensor]:
    """`outer`, and of all others, d_TR and x_TN, x.T @ d [N, R]: the gradients of A and of several B. T is the same of
    all; the results are views of one tensor.

    On Hopper up to four in one launch, and one for the sum of its parts, where a kernel takes all of them: one in 1.0
    to 1.2 times cuBLAS's time (1.36 at 1,024 columns), with `NormedRows` in 0.5 to 0.6 of a norm's and cuBLAS's; on the
    host as `project`.
    """
    x_TK = x.x_TK if isinstance(x, NormedRows) else x
    pairs = [(d_TS, x_TK), *others]
    if len(pairs) > _MOST_OUTER or not all(
        _has_kernel(d, d.shape[1]) and rows.stride(1) == 1 and use_kernels(rows) for d, rows in pairs
    ):
        x_TK = x.made() if isinstance(x, NormedRows) else x
        first = matmul_fp32(d_TS.t(), x_TK) if by_rank else matmul_fp32(x_TK.t(), d_TS)
        return [first, *(matmul_fp32(x_TN.t(), d_TR) for d_TR, x_TN in others)]
    T = len(d_TS)
    ranks, widths = [d.shape[1] for d, _ in pairs], [rows.shape[1] for _, rows in pairs]
    block_t = [outer_rows(rows.element_size()) for _, rows in pairs]
    blocks_k = sum(cdiv(width, _OUTER_K) for width in widths)
    most = max(2 * num_multiprocessors(d_TS.device) // blocks_k, cdiv(T, _LONGEST_SUM))
    rows_each, splits = _splits(T, max(block_t), most)
    sizes = [rank * width for rank, width in zip(ranks, widths, strict=True)]
    parts = torch.empty((splits, sum(sizes)), device=d_TS.device)
    missing = _MOST_OUTER - len(pairs)
    norm = (x.rstd_T, x.weight_K) if isinstance(x, NormedRows) else (None, None)
    rank_constants = {f"RANKS{i}": rank for i, rank in enumerate(ranks + [0] * missing)}
    with torch.cuda.device_of(d_TS):
        _outer_kernel[(blocks_k, splits)](
            *(matrix for pair in pairs for matrix in pair), *[None] * 2 * missing, *norm, parts,
            T, rows_each, *widths, *[0] * missing,
            *(matrix.stride(0) for pair in pairs for matrix in pair), *[0] * 2 * missing,
            x.offset if isinstance(x, NormedRows) else 0.0,
            **rank_constants, BY_RANK=by_rank, BLOCK_R0=max(16, next_power_of_2(ranks[0])),
            BLOCK_R=max(16, next_power_of_2(max(ranks[1:], default=1))), BLOCK_T0=block_t[0], BLOCK_T=min(block_t),
            BLOCK_K=_OUTER_K, num_warps=4,
        )  # fmt: skip
    found = (parts[0] if splits == 1 else parts.sum(0)).split(sizes)
    shapes = [(ranks[0], widths[0]) if by_rank else (widths[0], ranks[0]), *zip(widths[1:], ranks[1:], strict=True)]
    return [x.view(shape) for x, shape in zip(found, shapes, strict=True)]


def outer_rows(itemsize: int) -> int:
    """How many rows a tile of x has, which is 16 KiB."""
    return 256 // itemsize


def _has_kernel(x: Tensor, ranks: int) -> bool:
    """Whether a product of x [T, _] with so few ranks has a kernel: on Hopper, where they were measured."""
    if not use_kernels(x) or x.dtype == torch.float32 or len(x) == 0 or ranks > _MOST_RANKS or x.stride(1) != 1:
        return False
    return not x.is_cuda or compute_capability(x.device) == (9, 0)


def _splits(T: int, block_t: int, most: int) -> tuple[int, int]:
    """How many rows a program has, and how many programs have all."""
    rows = cdiv(cdiv(T, block_t), max(1, min(cdiv(T, block_t), most))) * block_t
    return rows, cdiv(T, rows)


def _one_pass_pays(dy_TN: Tensor, b_NR: Tensor, x_TR: Tensor) -> bool:
    (T, N), R = dy_TN.shape, x_TR.shape[1]
    if not use_kernels(dy_TN) or dy_TN.dtype == torch.float32 or x_TR.dtype != dy_TN.dtype or T == 0 or R > 32:
        return False
    if any(tensor.stride(1) != 1 for tensor in (dy_TN, b_NR, x_TR)):
        return False
    # Before Ampere a tile does not fit into shared memory; narrow results gain nothing.
    return not dy_TN.is_cuda or (N > 2048 and compute_capability(dy_TN.device) >= (8, 0))


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b summed and returned in fp32 (fp64 for fp64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
