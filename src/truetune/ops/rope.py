"""Rotary position embedding of queries and keys in one launch, with the RMSNorm of each head before it where a model
has one (Su et al., "RoFormer", arXiv:2104.09864; halves are rotated as in Transformers' Llama).

The backward pass rotates back and goes through the norm, whose statistics it makes again from the norm's input.

Letters of tensor shapes: T tokens, Q query heads, G key heads, D head size, R rotary part of a head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.ops.backend import tl, triton, use_kernels
from truetune.ops.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_reference

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:

    @triton.jit
    def _rope_heads(
        in_ptr, out_ptr, cos_ptr, sin_ptr, weight_ptr, x_ptr, dweight_ptr, block, T, heads, D, R,
        in_token, in_head, x_token, x_head, eps, offset,
        NORM: tl.constexpr, BACKWARD: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, HEADS: tl.constexpr,
        HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        """HEADS heads of the tokens that the programs share out: both rotated halves, and what passes through."""
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        first = tl.arange(0, HALF)[None, :]
        second = R // 2 + first
        rest = R + tl.arange(0, REST)[None, :]
        in_half, in_rest = first < R // 2, rest < D
        mask, rest_mask = in_half & (head < heads), in_rest & (head < heads)
        if NORM:
            weight0 = tl.load(weight_ptr + first, mask=in_half, other=0.0).to(tl.float32) + offset
            weight1 = tl.load(weight_ptr + second, mask=in_half, other=0.0).to(tl.float32) + offset
            weight2 = tl.load(weight_ptr + rest, mask=in_rest, other=0.0).to(tl.float32) + offset
        dweight0 = tl.zeros([HALF], tl.float32)
        dweight1 = tl.zeros([HALF], tl.float32)
        dweight2 = tl.zeros([REST], tl.float32)
        for number in range(tl.program_id(0), T, tl.num_programs(0)):
            token = tl.cast(number, tl.int64)
            source = in_ptr + token * in_token + head * in_head
            a = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + second, mask=mask, other=0.0).to(tl.float32)
            c = tl.load(source + rest, mask=rest_mask, other=0.0).to(tl.float32)
            cos0 = tl.load(cos_ptr + token * R + first, mask=in_half, other=0.0).to(tl.float32)
            cos1 = tl.load(cos_ptr + token * R + second, mask=in_half, other=0.0).to(tl.float32)
            sin0 = tl.load(sin_ptr + token * R + first, mask=in_half, other=0.0).to(tl.float32)
            sin1 = tl.load(sin_ptr + token * R + second, mask=in_half, other=0.0).to(tl.float32)
            if BACKWARD:
                rotated = a * cos0 + b * sin1
                b = b * cos1 - a * sin0
                a = rotated
                if NORM:
                    normed = x_ptr + token * x_token + head * x_head
                    xa = tl.load(normed + first, mask=mask, other=0.0).to(tl.float32)
                    xb = tl.load(normed + second, mask=mask, other=0.0).to(tl.float32)
                    xc = tl.load(normed + rest, mask=rest_mask, other=0.0).to(tl.float32)
                    square = tl.sum(xa * xa, 1) + tl.sum(xb * xb, 1) + tl.sum(xc * xc, 1)
                    rstd = (1.0 / tl.sqrt_rn(square / D + eps))[:, None]
                    xa *= rstd
                    xb *= rstd
                    xc *= rstd
                    if NEEDS_WEIGHT:
                        dweight0 += tl.sum(a * xa, 0)
                        dweight1 += tl.sum(b * xb, 0)
                        dweight2 += tl.sum(c * xc, 0)
                    a *= weight0
                    b *= weight1
                    c *= weight2
                    mean = ((tl.sum(a * xa, 1) + tl.sum(b * xb, 1) + tl.sum(c * xc, 1)) / D)[:, None]
                    a = (a - xa * mean) * rstd
                    b = (b - xb * mean) * rstd
                    c = (c - xc * mean) * rstd
            else:
                if NORM:
                    square = tl.sum(a * a, 1) + tl.sum(b * b, 1) + tl.sum(c * c, 1)
                    rstd = (1.0 / tl.sqrt_rn(square / D + eps))[:, None]
                    a *= rstd * weight0
                    b *= rstd * weight1
                    c *= rstd * weight2
                rotated = a * cos0 - b * sin0
                b = b * cos1 + a * sin1
                a = rotated
            target = out_ptr + (token * heads + head) * D
            tl.store(target + first, a.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + second, b.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(target + rest, c.to(out_ptr.dtype.element_ty), mask=rest_mask)
        if NEEDS_WEIGHT:
            into = dweight_ptr + (tl.program_id(0) * tl.cdiv(heads, HEADS) + block) * D
            half, others = tl.arange(0, HALF), R + tl.arange(0, REST)
            tl.store(into + half, dweight0, mask=half < R // 2)
            tl.store(into + R // 2 + half, dweight1, mask=half < R // 2)
            tl.store(into + others, dweight2, mask=others < D)

    @triton.jit
    def _rope_kernel(
        q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, xq_ptr, xk_ptr,
        dq_weight_ptr, dk_weight_ptr, T, Q, G, D, R,
        q_token, q_head, k_token, k_head, xq_token, xq_head, xk_token, xk_head, eps, offset,
        NORM: tl.constexpr, BACKWARD: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, HEADS: tl.constexpr,
        HALF: tl.constexpr, REST: tl.constexpr,
    ):  # fmt: skip
        """Programs of the first axis share out the tokens; those of the second take queries first, then keys."""
        query_blocks = tl.cdiv(Q, HEADS)
        block = tl.program_id(1)
        if block < query_blocks:
            _rope_heads(
                q_ptr, q_out_ptr, cos_ptr, sin_ptr, q_weight_ptr, xq_ptr, dq_weight_ptr, block, T, Q, D, R,
                q_token, q_head, xq_token, xq_head, eps, offset, NORM, BACKWARD, NEEDS_WEIGHT, HEADS, HALF, REST,
            )  # fmt: skip
        else:
            _rope_heads(
                k_ptr, k_out_ptr, cos_ptr, sin_ptr, k_weight_ptr, xk_ptr, dk_weight_ptr, block - query_blocks, T, G,
                D, R, k_token, k_head, xk_token, xk_head, eps, offset, NORM, BACKWARD, NEEDS_WEIGHT, HEADS, HALF, REST,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Launcher

_HEADS, _PROGRAMS = 8, 264  # heads of a program; programs, each of many tokens, where a weight's gradient is summed


class _HeadNorms(NamedTuple):
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    offset: float


def _launch(q_in, k_in, q_out, k_out, cos_TR, sin_TR, norms: _HeadNorms, *, backward, x=(None, None), needs_weight):
    (T, Q, D), G, R = q_in.shape, k_in.shape[1], cos_TR.shape[1]
    blocks_q, blocks_k = triton.cdiv(Q, _HEADS), triton.cdiv(G, _HEADS)
    programs = min(T, _PROGRAMS) if needs_weight else T
    sums = [q_in.new_empty((programs * blocks, D), dtype=torch.float32) if needs_weight else None
            for blocks in (blocks_q, blocks_k)]  # fmt: skip
    strides = [0 if tensor is None else tensor.stride(i) for tensor in (q_in, k_in, *x) for i in (0, 1)]
    if T:
        with torch.cuda.device_of(q_in):
            _rope_kernel[(programs, blocks_q + blocks_k)](
                q_in, k_in, q_out, k_out, cos_TR, sin_TR, norms.q_weight, norms.k_weight, *x, *sums,
                T, Q, G, D, R, *strides, norms.eps, norms.offset,
                NORM=norms.q_weight is not None, BACKWARD=backward, NEEDS_WEIGHT=needs_weight, HEADS=_HEADS,
                HALF=triton.next_power_of_2(R // 2), REST=triton.next_power_of_2(max(1, D - R)), num_warps=4,
            )  # fmt: skip
    return [None if total is None else total.sum(0) for total in sums]


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


def rope_forward(
    q_TQD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0, inplace: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(q, k) rotated, contiguous; with weights [D], each head normalised before.

    q and k may be views of a larger tensor, with the last dimension contiguous. `inplace` writes over them where they
    are contiguous.
    """
    norms = _HeadNorms(q_weight, k_weight, eps, offset)
    if not use_kernels(q_TQD):
        q = _rotate_torch(_normed_torch(q_TQD, q_weight, norms), cos_TR, sin_TR)
        k = _rotate_torch(_normed_torch(k_TGD, k_weight, norms), cos_TR, sin_TR)
        return (q_TQD.copy_(q), k_TGD.copy_(k)) if inplace else (q, k)
    outs = [x if inplace and x.is_contiguous() else torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (q_TQD, k_TGD)]  # fmt: skip
    _launch(q_TQD, k_TGD, *outs, cos_TR.contiguous(), sin_TR.contiguous(), norms, backward=False, needs_weight=False)
    return outs[0], outs[1]


def rope_backward(
    dq_TQD: Tensor, dk_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q: Tensor | None = None,
    k: Tensor | None = None, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 0.0,
    offset: float = 0.0, needs_weight: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, and the gradients [D] of the weights in fp32 where they are needed), contiguous.

    With weights, `q` and `k` are what went into the norms.
    """
    norms = _HeadNorms(q_weight, k_weight, eps, offset)
    if not use_kernels(dq_TQD):
        dq, dq_weight = _backward_torch(dq_TQD, cos_TR, sin_TR, q, q_weight, norms, needs_weight)
        dk, dk_weight = _backward_torch(dk_TGD, cos_TR, sin_TR, k, k_weight, norms, needs_weight)
        return dq, dk, dq_weight, dk_weight
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (dq_TQD, dk_TGD)]
    weights = _launch(
        dq_TQD, dk_TGD, *outs, cos_TR.contiguous(), sin_TR.contiguous(), norms,
        backward=True, x=(q, k), needs_weight=needs_weight,
    )  # fmt: skip
    return outs[0], outs[1], weights[0], weights[1]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, cos_TR, sin_TR, q_weight, k_weight, eps: float, offset: float):
        ctx.save_for_backward(q, k, cos_TR, sin_TR, q_weight, k_weight)
        ctx.eps, ctx.offset = eps, offset
        return rope_forward(q, k, cos_TR, sin_TR, q_weight=q_weight, k_weight=k_weight, eps=eps, offset=offset)

    @staticmethod
    def backward(ctx: Any, *grads: Any):
        q, k, cos_TR, sin_TR, q_weight, k_weight = ctx.saved_tensors
        dq, dk, dq_weight, dk_weight = rope_backward(
            *(grad.contiguous() for grad in grads), cos_TR, sin_TR, q=q, k=k, q_weight=q_weight, k_weight=k_weight,
            eps=ctx.eps, offset=ctx.offset, needs_weight=q_weight is not None,
        )  # fmt: skip
        return dq, dk, None, None, dq_weight, dk_weight, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Public function


def rope(
    q_TQD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries and keys with rotary embedding, after their heads' RMSNorm where weights [D] are given.

    cos and sin are those of Transformers: [T, R] with R <= D; the rest of a head passes through.
    """
    return _Rope.apply(q_TQD, k_TGD, cos_TR, sin_TR, q_weight, k_weight, eps, offset)


# ----------------------------------------------------------------------------------------------------------------------
# Plain PyTorch


def rope_reference(
    q_TQD: Tensor, k_TGD: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 0.0, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`rope` in plain PyTorch."""
    norms = _HeadNorms(q_weight, k_weight, eps, offset)
    q, k = (_normed_torch(x, weight, norms) for x, weight in ((q_TQD, q_weight), (k_TGD, k_weight)))
    return _rotate_torch(q, cos_TR, sin_TR), _rotate_torch(k, cos_TR, sin_TR)


def _normed_torch(x: Tensor, weight: Tensor | None, norms: _HeadNorms) -> Tensor:
    if weight is None:
        return x
    precise = x if x.dtype == torch.float64 else x.float()
    return rms_norm_reference(precise, weight, norms.eps, offset=norms.offset).to(x.dtype)


def _rotate_torch(x: Tensor, cos_TR: Tensor, sin_TR: Tensor, *, back: bool = False) -> Tensor:
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    R = cos_TR.shape[-1]
    (a, b), (cos0, cos1), (sin0, sin1) = (
        y.to(precise).chunk(2, -1) for y in (x[..., :R], cos_TR[:, None], sin_TR[:, None])
    )
    pair = (a * cos0 + b * sin1, b * cos1 - a * sin0) if back else (a * cos0 - b * sin0, b * cos1 + a * sin1)
    return torch.cat((torch.cat(pair, -1).to(x.dtype), x[..., R:]), -1)


def _backward_torch(dy, cos_TR, sin_TR, x, weight, norms: _HeadNorms, needs_weight: bool):
    dy = _rotate_torch(dy, cos_TR, sin_TR, back=True)
    if weight is None:
        return dy, None
    x_NH = x.reshape(-1, x.shape[-1])
    rstd_N = rms_norm_forward(x_NH, weight, norms.eps, offset=norms.offset).rstd_T
    dx, dweight = rms_norm_backward(
        dy.reshape(x_NH.shape), x_NH, weight, rstd_N, offset=norms.offset, needs_weight=needs_weight
    )
    return dx.view(x.shape), dweight
