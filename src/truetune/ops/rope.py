"""Rotary position embedding (Su et al., "RoFormer", 2021) of queries and keys in one launch, and with it the RMSNorm
of each head that stands before it in some models (Qwen3, Gemma 3).

The first R of a head's D numbers are rotated, number i with number i + R/2, as Transformers does it:

    out[i]       = x[i]       * cos[i]       - x[i + R/2] * sin[i]
    out[i + R/2] = x[i + R/2] * cos[i + R/2] + x[i]       * sin[i + R/2]

and the rest passes. Everything between a load and a store is fp32, rounded once. Saved for backward: cos and sin, and
with norms q and k as they came in; 1 / rms is made again, as the head is in registers anyway.

Letters of tensor shapes: T tokens, H query heads, G key heads, D head dimension, R rotary dimension.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from truetune.ops.backend import next_power_of_2, num_multiprocessors, tl, triton, use_kernels

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels. A token's heads are three tiles: the two halves that are rotated, and the rest.

if triton is not None:

    @triton.jit
    def _load_tiles(
        ptr, head_stride, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        """The tiles in fp32, [BLOCK_HEADS, BLOCK_HALF] twice and [BLOCK_HEADS, BLOCK_REST]."""
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        half, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
        row_ptr = ptr + head * head_stride
        rotated = (head < HEADS) & (half < R // 2)
        x_a = tl.load(row_ptr + half, mask=rotated, other=0.0).to(tl.float32)
        x_b = tl.load(row_ptr + R // 2 + half, mask=rotated, other=0.0).to(tl.float32)
        x_c = tl.zeros([BLOCK_HEADS, BLOCK_REST], tl.float32)
        if R < D:
            x_c = tl.load(row_ptr + R + rest, mask=(head < HEADS) & (rest < D - R), other=0.0).to(tl.float32)
        return x_a, x_b, x_c

    @triton.jit
    def _store_tiles(
        ptr, head_stride, x_a, x_b, x_c, HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        half, rest = tl.arange(0, BLOCK_HALF)[None, :], tl.arange(0, BLOCK_REST)[None, :]
        row_ptr = ptr + head * head_stride
        rotated = (head < HEADS) & (half < R // 2)
        tl.store(row_ptr + half, x_a.to(ptr.dtype.element_ty), mask=rotated)
        tl.store(row_ptr + R // 2 + half, x_b.to(ptr.dtype.element_ty), mask=rotated)
        if R < D:
            tl.store(row_ptr + R + rest, x_c.to(ptr.dtype.element_ty), mask=(head < HEADS) & (rest < D - R))

    @triton.jit
    def _load_angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, R: tl.constexpr, BLOCK_HALF: tl.constexpr):
        """cos and sin of either half, [1, BLOCK_HALF]."""
        half = tl.arange(0, BLOCK_HALF)[None, :]
        mask = half < R // 2
        cos_ptr += token * cos_stride
        sin_ptr += token * sin_stride
        cos_a = tl.load(cos_ptr + half, mask=mask, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + R // 2 + half, mask=mask, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + half, mask=mask, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + R // 2 + half, mask=mask, other=0.0).to(tl.float32)
        return cos_a, cos_b, sin_a, sin_b

    @triton.jit
    def _rstd(x_a, x_b, x_c, eps, D: tl.constexpr, R: tl.constexpr):
        """1 / rms of each head, [BLOCK_HEADS, 1]."""
        square = tl.sum(x_a * x_a + x_b * x_b, 1)
        if R < D:
            square += tl.sum(x_c * x_c, 1)
        return tl.rsqrt(square / D + eps)[:, None]

    @triton.jit
    def _forward_heads(
        x_ptr, out_ptr, weight_ptr, head_stride, out_head_stride, cos_a, cos_b, sin_a, sin_b, eps, offset,
        HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        x_a, x_b, x_c = _load_tiles(x_ptr, head_stride, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)
        if weight_ptr is not None:
            w_a, w_b, w_c = _load_tiles(weight_ptr, 0, 1, D, R, 1, BLOCK_HALF, BLOCK_REST)
            rstd = _rstd(x_a, x_b, x_c, eps, D, R)
            x_a *= rstd * (offset + w_a)
            x_b *= rstd * (offset + w_b)
            x_c *= rstd * (offset + w_c)
        out_a = x_a * cos_a - x_b * sin_a
        out_b = x_b * cos_b + x_a * sin_b
        _store_tiles(out_ptr, out_head_stride, out_a, out_b, x_c, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)

    @triton.jit
    def _backward_heads(
        dout_ptr, dx_ptr, x_ptr, weight_ptr, dout_head_stride, dx_head_stride, head_stride,
        cos_a, cos_b, sin_a, sin_b, eps, offset,
        HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        """Stores dx; the tiles that come back sum over the heads to the weight's gradient."""
        dout_a, dout_b, d_c = _load_tiles(dout_ptr, dout_head_stride, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)
        d_a = dout_a * cos_a + dout_b * sin_b
        d_b = dout_b * cos_b - dout_a * sin_a
        x_a, x_b, x_c = d_a, d_b, d_c
        if weight_ptr is not None:
            x_a, x_b, x_c = _load_tiles(x_ptr, head_stride, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)
            w_a, w_b, w_c = _load_tiles(weight_ptr, 0, 1, D, R, 1, BLOCK_HALF, BLOCK_REST)
            rstd = _rstd(x_a, x_b, x_c, eps, D, R)
            # From here x is what was normalised, before its product with the weight; then its product with d.
            x_a, x_b, x_c = x_a * rstd, x_b * rstd, x_c * rstd
            g_a, g_b, g_c = d_a * (offset + w_a), d_b * (offset + w_b), d_c * (offset + w_c)
            mean = tl.sum(g_a * x_a + g_b * x_b, 1)
            if R < D:
                mean += tl.sum(g_c * x_c, 1)
            mean = (mean / D)[:, None]
            dx_a, dx_b, dx_c = (g_a - x_a * mean) * rstd, (g_b - x_b * mean) * rstd, (g_c - x_c * mean) * rstd
            x_a, x_b, x_c = x_a * d_a, x_b * d_b, x_c * d_c
            d_a, d_b, d_c = dx_a, dx_b, dx_c
        _store_tiles(dx_ptr, dx_head_stride, d_a, d_b, d_c, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST)
        return x_a, x_b, x_c

    @triton.jit
    def _rope_forward_kernel(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
        q_stride, q_head_stride, k_stride, k_head_stride,
        q_out_stride, q_out_head_stride, k_out_stride, k_out_head_stride, cos_stride, sin_stride, eps, offset,
        HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        BLOCK_HEADS: tl.constexpr, BLOCK_KEY_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        """One program a token."""
        token = tl.program_id(0).to(tl.int64)
        cos_a, cos_b, sin_a, sin_b = _load_angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, R, BLOCK_HALF)
        _forward_heads(
            q_ptr + token * q_stride, q_out_ptr + token * q_out_stride, q_weight_ptr, q_head_stride, q_out_head_stride,
            cos_a, cos_b, sin_a, sin_b, eps, offset, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        _forward_heads(
            k_ptr + token * k_stride, k_out_ptr + token * k_out_stride, k_weight_ptr, k_head_stride, k_out_head_stride,
            cos_a, cos_b, sin_a, sin_b, eps, offset, KEY_HEADS, D, R, BLOCK_KEY_HEADS, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip

    @triton.jit(do_not_specialize=["T"])  # no kernel of its own for batches whose length 16 divides
    def _rope_backward_kernel(
        dq_ptr, dk_ptr, dq_out_ptr, dk_out_ptr, q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, dweight_ptr,
        dq_stride, dq_head_stride, dk_stride, dk_head_stride,
        dq_out_stride, dq_out_head_stride, dk_out_stride, dk_out_head_stride,
        q_stride, q_head_stride, k_stride, k_head_stride, cos_stride, sin_stride, T, eps, offset,
        HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
        BLOCK_HEADS: tl.constexpr, BLOCK_KEY_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    ):  # fmt: skip
        """A program goes through the tokens in steps of the grid, and sums its part of the weights' gradients, [2, D],
        on the way. The outputs may be the incoming gradients."""
        dq_weight_a = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
        dq_weight_b = tl.zeros([BLOCK_HEADS, BLOCK_HALF], tl.float32)
        dq_weight_c = tl.zeros([BLOCK_HEADS, BLOCK_REST], tl.float32)
        dk_weight_a = tl.zeros([BLOCK_KEY_HEADS, BLOCK_HALF], tl.float32)
        dk_weight_b = tl.zeros([BLOCK_KEY_HEADS, BLOCK_HALF], tl.float32)
        dk_weight_c = tl.zeros([BLOCK_KEY_HEADS, BLOCK_REST], tl.float32)
        for token in range(tl.program_id(0).to(tl.int64), T, tl.num_programs(0)):
            cos_a, cos_b, sin_a, sin_b = _load_angles(cos_ptr, sin_ptr, token, cos_stride, sin_stride, R, BLOCK_HALF)
            part_a, part_b, part_c = _backward_heads(
                dq_ptr + token * dq_stride, dq_out_ptr + token * dq_out_stride, q_ptr + token * q_stride,
                q_weight_ptr, dq_head_stride, dq_out_head_stride, q_head_stride,
                cos_a, cos_b, sin_a, sin_b, eps, offset, HEADS, D, R, BLOCK_HEADS, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            if dweight_ptr is not None:
                dq_weight_a += part_a
                dq_weight_b += part_b
                dq_weight_c += part_c
            part_a, part_b, part_c = _backward_heads(
                dk_ptr + token * dk_stride, dk_out_ptr + token * dk_out_stride, k_ptr + token * k_stride,
                k_weight_ptr, dk_head_stride, dk_out_head_stride, k_head_stride,
                cos_a, cos_b, sin_a, sin_b, eps, offset, KEY_HEADS, D, R, BLOCK_KEY_HEADS, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            if dweight_ptr is not None:
                dk_weight_a += part_a
                dk_weight_b += part_b
                dk_weight_c += part_c
        if dweight_ptr is not None:
            dweight_ptr += tl.program_id(0) * (2 * D)
            _store_tiles(
                dweight_ptr, 0, tl.sum(dq_weight_a, 0)[None, :], tl.sum(dq_weight_b, 0)[None, :],
                tl.sum(dq_weight_c, 0)[None, :], 1, D, R, 1, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip
            _store_tiles(
                dweight_ptr + D, 0, tl.sum(dk_weight_a, 0)[None, :], tl.sum(dk_weight_b, 0)[None, :],
                tl.sum(dk_weight_c, 0)[None, :], 1, D, R, 1, BLOCK_HALF, BLOCK_REST,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


@cache
def _tiles(heads: int, key_heads: int, D: int, R: int, elements: int, most_warps: int = 8) -> dict[str, int]:
    """The kernels' constants, with so many warps that a thread holds about `elements` of the queries, but at most 8:
    with more, a thread loads less than 4 bytes of the keys at once."""
    half, rest = next_power_of_2(R // 2), next_power_of_2(max(1, D - R))
    block_heads = next_power_of_2(heads)
    return {
        "HEADS": heads, "KEY_HEADS": key_heads, "D": D, "R": R,
        "BLOCK_HEADS": block_heads, "BLOCK_KEY_HEADS": next_power_of_2(key_heads),
        "BLOCK_HALF": half, "BLOCK_REST": rest,
        "num_warps": min(most_warps, max(2, next_power_of_2(block_heads * (2 * half + rest) // (32 * elements)))),
    }  # fmt: skip


def elements_backward(heads: int) -> tuple[int, int]:
    """For `_tiles`: 32 and 8 heads of 16,384 tokens, with norms, take 0.13 ms on an H200, and with 8 warps 0.20."""
    return 16, 4 if heads <= 32 else 8


def _launch_forward(q, k, q_out, k_out, q_weight_D, k_weight_D, cos_TR, sin_TR, eps, offset) -> None:
    T, H, D = q.shape
    with torch.cuda.device_of(q):
        _rope_forward_kernel[(T,)](
            q, k, q_out, k_out, q_weight_D, k_weight_D, cos_TR, sin_TR,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            q_out.stride(0), q_out.stride(1), k_out.stride(0), k_out.stride(1),
            cos_TR.stride(0), sin_TR.stride(0), eps, offset, **_tiles(H, k.shape[1], D, cos_TR.shape[1], 32),
        )  # fmt: skip


def _launch_backward(
    dq, dk, dq_out, dk_out, q, k, q_weight_D, k_weight_D, cos_TR, sin_TR, eps, offset, needs_weight
) -> tuple[Tensor | None, Tensor | None]:
    """The weights' gradients."""
    T, H, D = dq.shape
    tiles = _tiles(H, dk.shape[1], D, cos_TR.shape[1], *elements_backward(H))
    programs, dweight_P2D = T, None
    if needs_weight:
        programs = min(T, num_multiprocessors(dq.device) * max(1, 32 // tiles["num_warps"]))
        dweight_P2D = torch.empty((programs, 2, D), dtype=torch.float32, device=dq.device)
    x, y = (dq, dk) if q is None else (q, k)  # for their strides
    with torch.cuda.device_of(dq):
        _rope_backward_kernel[(programs,)](
            dq, dk, dq_out, dk_out, x, y, q_weight_D, k_weight_D, cos_TR, sin_TR, dweight_P2D,
            dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1),
            dq_out.stride(0), dq_out.stride(1), dk_out.stride(0), dk_out.stride(1),
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), cos_TR.stride(0), sin_TR.stride(0), T, eps, offset,
            **tiles,
        )  # fmt: skip
        if dweight_P2D is None:
            return None, None
        dweight_2D = dweight_P2D.sum(0)
        return dweight_2D[0], dweight_2D[1]


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


def rope_forward(
    q_THD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0, inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k rotated; with `q_weight` and `k_weight` [D] each head is x * rsqrt(mean(x^2) + eps) * (offset + weight)
    before. cos and sin are the two of Transformers' rotary embedding, of any float dtype, of one row a token.

    Of every tensor the last dimension is contiguous; tokens and heads may have any stride. The results have the dtypes
    of q and k and are new and contiguous, or with `inplace` q and k themselves (not with norms, whose backward pass
    needs what came in). Not differentiable.
    """
    if not use_kernels(q_THD):
        return _forward_torch(q_THD, k_TGD, cos_TR, sin_TR, q_weight, k_weight, eps, offset, inplace)
    q, k = (q_THD, k_TGD) if inplace else (_new_like(q_THD), _new_like(k_TGD))
    if q.shape[0]:
        _launch_forward(q_THD, k_TGD, q, k, q_weight, k_weight, cos_TR, sin_TR, eps, offset)
    return q, k


def rope_backward(
    dq_THD: Tensor, dk_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q: Tensor | None = None,
    k: Tensor | None = None, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 0.0,
    offset: float = 0.0, needs_weight: bool = False, inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of q and k, and in fp32 of q_weight and k_weight, or None without `needs_weight`.

    `q` and `k` are what `rope_forward` was given, wanted with norms only. Strides are as there; the gradients have the
    dtypes of dq and dk, and with `inplace` they are written over these.
    """
    if not use_kernels(dq_THD):
        return _backward_torch(
            dq_THD, dk_TGD, cos_TR, sin_TR, q, k, q_weight, k_weight, eps, offset, needs_weight, inplace
        )
    dq, dk = (dq_THD, dk_TGD) if inplace else (_new_like(dq_THD), _new_like(dk_TGD))
    if dq.shape[0]:
        return (
            dq,
            dk,
            *_launch_backward(
                dq_THD, dk_TGD, dq, dk, q, k, q_weight, k_weight, cos_TR, sin_TR, eps, offset, needs_weight
            ),
        )
    if needs_weight:
        return dq, dk, *torch.zeros((2, dq.shape[2]), dtype=torch.float32, device=dq.device)
    return dq, dk, None, None


def _new_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


# ----------------------------------------------------------------------------------------------------------------------
# Public function


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, cos_TR, sin_TR, q_weight, k_weight, eps, offset):
        norms = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps, "offset": offset}
        saved = (None, None) if q_weight is None else (q, k)
        ctx.save_for_backward(cos_TR, sin_TR, *saved, q_weight, k_weight)
        ctx.eps, ctx.offset = eps, offset
        return rope_forward(q, k, cos_TR, sin_TR, **norms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq, dk):
        cos_TR, sin_TR, q, k, q_weight, k_weight = ctx.saved_tensors
        dq, dk, dq_weight, dk_weight = rope_backward(
            dq.contiguous(), dk.contiguous(), cos_TR, sin_TR, q=q, k=k, q_weight=q_weight, k_weight=k_weight,
            eps=ctx.eps, offset=ctx.offset, needs_weight=any(ctx.needs_input_grad[4:6]),
        )  # fmt: skip
        if dq_weight is not None and dk_weight is not None:
            dq_weight, dk_weight = dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)
        return dq, dk, None, None, dq_weight, dk_weight, None, None


def rope(
    q_THD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rope_forward`, not in place, as a function that can be differentiated once in q, k and the weights."""
    return _Rope.apply(q_THD, k_TGD, cos_TR, sin_TR, q_weight, k_weight, eps, offset)


# ----------------------------------------------------------------------------------------------------------------------
# Reference


def rope_reference(
    q_THD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rope` as PyTorch would do it, differentiated by autograd."""
    return _forward_torch(q_THD, k_TGD, cos_TR, sin_TR, q_weight, k_weight, eps, offset, False)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rotate(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, back: bool = False) -> Tensor:
    """The rotation in fp32 or fp64, or with `back` its transpose."""
    rotary, rest = x.split([cos_TR.shape[1], x.shape[2] - cos_TR.shape[1]], -1)
    x_a, x_b = rotary.chunk(2, -1)
    cos_a, cos_b = cos_TR.to(x.dtype)[:, None].chunk(2, -1)
    sin_a, sin_b = sin_TR.to(x.dtype)[:, None].chunk(2, -1)
    if back:
        return torch.cat((x_a * cos_a + x_b * sin_b, x_b * cos_b - x_a * sin_a, rest), -1)
    return torch.cat((x_a * cos_a - x_b * sin_a, x_b * cos_b + x_a * sin_b, rest), -1)


def _reference_rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _forward_torch(q, k, cos_TR, sin_TR, q_weight, k_weight, eps, offset, inplace) -> tuple[Tensor, Tensor]:
    """`rope_forward` in plain PyTorch."""
    results = []
    for x_in, weight in ((q, q_weight), (k, k_weight)):
        x = _precise(x_in)
        if weight is not None:
            x = x * _reference_rstd(x, eps) * (offset + weight.to(x.dtype))
        out = _rotate(x, cos_TR, sin_TR)
        results.append(x_in.copy_(out) if inplace else out.to(x_in.dtype))
    return results[0], results[1]


def _backward_torch(
    dq, dk, cos_TR, sin_TR, q, k, q_weight, k_weight, eps, offset, needs_weight, inplace
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`rope_backward` in plain PyTorch."""
    grads, dweights = [], []
    for dout, x, weight in ((dq, q, q_weight), (dk, k, k_weight)):
        d = _rotate(_precise(dout), cos_TR, sin_TR, back=True)
        dweight = None
        if weight is not None:
            x = _precise(x)
            rstd = _reference_rstd(x, eps)
            normed = x * rstd
            dweight = (d * normed).sum((0, 1)) if needs_weight else None
            scaled = d * (offset + weight.to(x.dtype))
            d = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * rstd
        grads.append(dout.copy_(d) if inplace else d.to(dout.dtype))
        dweights.append(dweight)
    return grads[0], grads[1], dweights[0], dweights[1]
