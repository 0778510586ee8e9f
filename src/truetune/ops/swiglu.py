"""Gated activations, act = f(gate) * up: SwiGLU (f = SiLU) and GeGLU (f = GELU) of Shazeer, "GLU Variants Improve
Transformer", 2020.

Forward reads gate and up once, backward reads them and the gradient once, writes both gradients over gate and up, and
makes `act` again on the way, so that a block need not keep it. Everything between a load and a store is fp32. Either
direction also gives its result in FP8 for the GEMM that comes next, in the same launch.

With LoRA, gate and up may come without their adapters' part: both directions add it as they read, from its factors
(`LowRank`), so that it is never written. That takes tiles of several rows, which a tensor core can multiply; without it
a tile lies in one row.

Letters of tensor shapes: T tokens, I intermediate size, R rank.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.ops.backend import tl, triton, use_kernels
from truetune.ops.fp8 import FP8, quantize_rows_reference
from truetune.ops.lora import LowRank, matmul_fp32

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""`gelu_tanh` is Transformers' `gelu_pytorch_tanh`, `gelu` the exact one."""

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    from truetune.ops.fp8 import row_scale
    from truetune.ops.lora import add_low_rank

    @triton.jit
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def _activate(gate, ACTIVATION: tl.constexpr):
        """f(gate) and f'(gate)."""
        if ACTIVATION == "silu":
            share = _sigmoid(gate)
            slope = share * (1.0 + gate * (1.0 - share))
        elif ACTIVATION == "gelu_tanh":
            # (1 + tanh(u / 2)) / 2 is the sigmoid of u, which loses no digits where tanh comes near -1.
            square = gate * gate
            u = gate * (1.5957691216057308 + 0.07135481282553257 * square)
            small = tl.exp(-tl.abs(u))
            larger = 1.0 / (1.0 + small)
            share = tl.where(u >= 0, larger, small * larger)
            # share (1 - share), without the difference that would lose all digits where gate is large.
            slope = share + gate * small * larger * larger * (1.5957691216057308 + 0.2140644384765977 * square)
        else:
            share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
            slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        return gate * share, slope

    @triton.jit
    def _gradients(dact, gate, up, ACTIVATION: tl.constexpr):
        """The gradients of gate and up, and act."""
        value, slope = _activate(gate, ACTIVATION)
        return dact * up * slope, dact * value, value * up

    @triton.jit
    def _program(width, span, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
        """(rows, first column, columns of a tile): scalar and [BLOCK], or [BLOCK_T, 1] and [1, BLOCK] for several rows.

        One program takes `span` columns: a tile, or, to know the largest before the first is rounded, all.
        """
        spans = tl.cdiv(width, span)
        row = (tl.program_id(0) // spans).to(tl.int64)
        cols = tl.arange(0, BLOCK)
        if BLOCK_T > 1:
            row = (row * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
            cols = cols[None, :]
        return row, tl.program_id(0) % spans * span, cols

    @triton.jit
    def _inside(row, cols, T, width, BLOCK_T: tl.constexpr):
        mask = cols < width
        if BLOCK_T > 1:
            mask = mask & (row < T)
        return mask

    @triton.jit
    def _zeros(BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
        if BLOCK_T > 1:
            zeros = tl.zeros([BLOCK_T, BLOCK], tl.float32)
        else:
            zeros = tl.zeros([BLOCK], tl.float32)
        return zeros

    @triton.jit
    def _scale_of_rows(scale_ptr, amax, row, T, BLOCK_T: tl.constexpr):
        """Stores the rows' scales; gives their inverses."""
        if BLOCK_T > 1:
            largest = tl.max(amax, 1, keep_dims=True)
        else:
            largest = tl.max(amax, 0)
        scale, inverse = row_scale(largest)
        tl.store(scale_ptr + row, scale, mask=row < T)
        return inverse

    @triton.jit
    def _round_to_fp8(x_ptr, x8_ptr, x_stride, x8_stride, inverse, row, cols, mask):
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(x8_ptr + row * x8_stride + cols, (x * inverse).to(tl.float8e4nv), mask=mask)

    @triton.jit(do_not_specialize=["T"])
    def _glu_forward_kernel(
        gate_ptr, up_ptr, act_ptr, act8_ptr, scale_ptr, gate_x_ptr, gate_b_ptr, up_x_ptr, up_b_ptr,
        gate_stride, up_stride, gate_x_stride, gate_b_stride, up_x_stride, up_b_stride, T, width, span,
        ACTIVATION: tl.constexpr, QUANTIZE: tl.constexpr, GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        row, first, lanes = _program(width, span, BLOCK_T, BLOCK)
        amax = _zeros(BLOCK_T, BLOCK)
        for start in tl.range(first, first + span, BLOCK, num_stages=1):  # no copies ahead, which take shared memory
            cols = start + lanes
            mask = _inside(row, cols, T, width, BLOCK_T)
            gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
            gate = add_low_rank(
                gate, gate_x_ptr, gate_b_ptr, row, cols, T, width, gate_x_stride, gate_b_stride, 1, GATE_RANK, BLOCK_R
            )
            up = add_low_rank(
                up, up_x_ptr, up_b_ptr, row, cols, T, width, up_x_stride, up_b_stride, 1, UP_RANK, BLOCK_R
            )
            value, _ = _activate(gate, ACTIVATION)
            act = (value * up).to(act_ptr.dtype.element_ty)
            tl.store(act_ptr + row * width + cols, act, mask=mask)
            if QUANTIZE:
                amax = tl.maximum(amax, tl.abs(act.to(tl.float32)))
        if QUANTIZE:
            inverse = _scale_of_rows(scale_ptr, amax, row, T, BLOCK_T)
            tl.debug_barrier()  # what was stored is loaded again
            for start in range(0, width, BLOCK):
                cols = start + lanes
                mask = _inside(row, cols, T, width, BLOCK_T)
                _round_to_fp8(act_ptr, act8_ptr, width, width, inverse, row, cols, mask)

    @triton.jit(do_not_specialize=["T"])
    def _glu_backward_kernel(
        dact_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, act_ptr, dgate8_ptr, dup8_ptr, dgate_scale_ptr, dup_scale_ptr,
        gate_x_ptr, gate_b_ptr, up_x_ptr, up_b_ptr,
        dact_stride, gate_stride, up_stride, dgate_stride, dup_stride, act_stride, grad8_stride,
        gate_x_stride, gate_b_stride, up_x_stride, up_b_stride, T, width, span,
        ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, QUANTIZE: tl.constexpr, ONE_SCALE: tl.constexpr,
        GATE_RANK: tl.constexpr, UP_RANK: tl.constexpr,
        BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """dgate may be gate, dup up, and act dact: a tile is loaded, then stored."""
        row, first, lanes = _program(width, span, BLOCK_T, BLOCK)
        dgate_amax = _zeros(BLOCK_T, BLOCK)
        dup_amax = _zeros(BLOCK_T, BLOCK)
        for start in tl.range(first, first + span, BLOCK, num_stages=1):
            cols = start + lanes
            mask = _inside(row, cols, T, width, BLOCK_T)
            dact = tl.load(dact_ptr + row * dact_stride + cols, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
            gate = add_low_rank(
                gate, gate_x_ptr, gate_b_ptr, row, cols, T, width, gate_x_stride, gate_b_stride, 1, GATE_RANK, BLOCK_R
            )
            up = add_low_rank(
                up, up_x_ptr, up_b_ptr, row, cols, T, width, up_x_stride, up_b_stride, 1, UP_RANK, BLOCK_R
            )
            if BLOCK_T > 1:
                tl.debug_barrier()  # a product's threads hold other elements than they load and store
            dgate, dup, act = _gradients(dact, gate, up, ACTIVATION)
            dgate = dgate.to(dgate_ptr.dtype.element_ty)
            dup = dup.to(dup_ptr.dtype.element_ty)
            tl.store(dgate_ptr + row * dgate_stride + cols, dgate, mask=mask)
            tl.store(dup_ptr + row * dup_stride + cols, dup, mask=mask)
            if RECOMPUTE:
                tl.store(act_ptr + row * act_stride + cols, act.to(act_ptr.dtype.element_ty), mask=mask)
            if QUANTIZE:
                dgate_amax = tl.maximum(dgate_amax, tl.abs(dgate.to(tl.float32)))
                dup_amax = tl.maximum(dup_amax, tl.abs(dup.to(tl.float32)))
        if QUANTIZE:
            if ONE_SCALE:
                dgate_amax = tl.maximum(dgate_amax, dup_amax)
                dup_amax = dgate_amax
            dgate_inverse = _scale_of_rows(dgate_scale_ptr, dgate_amax, row, T, BLOCK_T)
            dup_inverse = _scale_of_rows(dup_scale_ptr, dup_amax, row, T, BLOCK_T)
            tl.debug_barrier()  # what was stored is loaded again
            for start in range(0, width, BLOCK):
                cols = start + lanes
                mask = _inside(row, cols, T, width, BLOCK_T)
                _round_to_fp8(dgate_ptr, dgate8_ptr, dgate_stride, grad8_stride, dgate_inverse, row, cols, mask)
                _round_to_fp8(dup_ptr, dup8_ptr, dup_stride, grad8_stride, dup_inverse, row, cols, mask)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers

_TILE, _ROW_TILE = 1024, 2048  # columns: of a program that has one tile, and of one that has a whole row
_LOW_RANK_TILE, _LOW_RANK_ROW_TILE = (32, 64), (16, 128)  # rows and columns, likewise
_BLOCK_R = 16  # ranks at once: what a tensor core multiplies at the least; more take registers

LowRanks = tuple[LowRank | None, LowRank | None]
"""What is added to gate, and what to up."""


class GluGrads(NamedTuple):
    """What the backward pass gives. The FP8 tensors and their scales, one a row, are None unless asked for."""

    dgate_TI: Tensor
    dup_TI: Tensor
    act_TI: Tensor | None = None
    dgate8_TI: Tensor | None = None
    dgate_scale_T: Tensor | None = None
    dup8_TI: Tensor | None = None
    dup_scale_T: Tensor | None = None


def _blocks(T: int, width: int, quantize: bool, low_rank: LowRanks) -> tuple[tuple[int], int, dict[str, int]]:
    """The grid, `span`, and the constants and warps, for 8 elements of a row a thread, or 16 of several rows."""
    ranks = [0 if part is None else part.b_NR.shape[1] for part in low_rank]
    if any(ranks):
        rows, block = _LOW_RANK_ROW_TILE if quantize else _LOW_RANK_TILE
        block = min(block, max(16, triton.next_power_of_2(width)))
        num_warps = max(1, rows * block // 512)  # more a thread, and registers leave room for few programs at once
    else:
        rows, block = 1, min(_ROW_TILE if quantize else _TILE, triton.next_power_of_2(width))
        num_warps = max(1, block // 256)
    span = width if quantize else block
    constants = {
        "GATE_RANK": ranks[0], "UP_RANK": ranks[1],
        "BLOCK_T": rows, "BLOCK": block, "BLOCK_R": _BLOCK_R, "num_warps": num_warps,
    }  # fmt: skip
    return (triton.cdiv(T, rows) * triton.cdiv(width, span),), span, constants


def _factors(low_rank: LowRanks) -> tuple[list[Tensor | None], list[int]]:
    """The factors of gate's part and of up's, and their strides; their elements are neighbours."""
    tensors = [factor for part in low_rank for factor in (part or (None, None))]
    assert all(factor is None or factor.shape[1] == 1 or factor.stride(1) == 1 for factor in tensors)
    return tensors, [0 if factor is None else factor.stride(0) for factor in tensors]


def _launch_forward(gate_TI, up_TI, act_TI, act8_TI, scale_T, activation: str, low_rank: LowRanks) -> None:
    T, width = gate_TI.shape
    quantize = act8_TI is not None
    grid, span, constants = _blocks(T, width, quantize, low_rank)
    factors, strides = _factors(low_rank)
    with torch.cuda.device_of(gate_TI):
        _glu_forward_kernel[grid](
            gate_TI, up_TI, act_TI, act8_TI, scale_T, *factors, gate_TI.stride(0), up_TI.stride(0), *strides,
            T, width, span, ACTIVATION=activation, QUANTIZE=quantize, **constants,
        )  # fmt: skip


def _launch_backward(dact_TI, gate_TI, up_TI, grads: GluGrads, activation: str, low_rank: LowRanks) -> None:
    T, width = gate_TI.shape
    dgate_TI, dup_TI, act_TI, dgate8_TI, dgate_scale_T, dup8_TI, dup_scale_T = grads
    grid, span, constants = _blocks(T, width, dgate8_TI is not None, low_rank)
    factors, strides = _factors(low_rank)
    with torch.cuda.device_of(gate_TI):
        _glu_backward_kernel[grid](
            dact_TI, gate_TI, up_TI, dgate_TI, dup_TI, act_TI, dgate8_TI, dup8_TI, dgate_scale_T, dup_scale_T, *factors,
            dact_TI.stride(0), gate_TI.stride(0), up_TI.stride(0), dgate_TI.stride(0), dup_TI.stride(0),
            0 if act_TI is None else act_TI.stride(0), 0 if dgate8_TI is None else dgate8_TI.stride(0), *strides,
            T, width, span, ACTIVATION=activation, RECOMPUTE=act_TI is not None, QUANTIZE=dgate8_TI is not None,
            ONE_SCALE=dgate_scale_T is dup_scale_T, **constants,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


def glu_forward(
    gate_TI: Tensor,
    up_TI: Tensor,
    activation: Activation,
    *,
    low_rank: LowRanks = (None, None),
    quantize: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(act_TI, act8_TI, scale_T) with act = f(gate) * up in gate's dtype, rounded once.

    gate and up have the last dimension contiguous; they may be the halves of one [T, 2I] buffer. `low_rank`: what is
    added to gate and what to up, in fp32, before anything else. With `quantize`, act8 and scale are
    `quantize_rows(act)`; otherwise None.
    """
    if not use_kernels(gate_TI):
        return _glu_forward_torch(gate_TI, up_TI, activation, low_rank, quantize)
    act_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
    act8_TI = torch.empty(gate_TI.shape, dtype=FP8, device=gate_TI.device) if quantize else None
    scale_T = torch.empty(gate_TI.shape[0], dtype=torch.float32, device=gate_TI.device) if quantize else None
    if act_TI.numel():
        _launch_forward(gate_TI, up_TI, act_TI, act8_TI, scale_T, activation, low_rank)
    return act_TI, act8_TI, scale_T


def glu_backward(
    dact_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    activation: Activation,
    *,
    low_rank: LowRanks = (None, None),
    inplace: bool = True,
    recompute: bool = True,
    act_out: Tensor | None = None,
    quantize: bool = False,
    grads8_out: Tensor | None = None,
) -> GluGrads:
    """The gradients of gate and up, written over them if `inplace`; and `act` again with `recompute`.

    gate, up and `low_rank` are those of `glu_forward`. `act_out` takes act, and may be dact. With `quantize` the
    gradients come in FP8 too, as `quantize_rows` would give them: each contiguous and with a scale of its own, for two
    GEMMs; or, for one GEMM over both, as the halves of `grads8_out`, a [T, 2I] buffer, under one scale a row
    (`dgate_scale_T is dup_scale_T`).
    """
    T, width = gate_TI.shape
    if not use_kernels(gate_TI):
        return _glu_backward_torch(
            dact_TI, gate_TI, up_TI, activation, low_rank, inplace, recompute, act_out, quantize, grads8_out
        )

    def new(shape, dtype=gate_TI.dtype):
        return torch.empty(shape, dtype=dtype, device=gate_TI.device)

    dgate_TI, dup_TI = (gate_TI, up_TI) if inplace else (new((T, width)), new((T, width)))
    act_TI = (new((T, width)) if act_out is None else act_out) if recompute else None
    grads8: tuple[Tensor, ...] = ()
    if quantize and grads8_out is not None:
        scale_T = new(T, torch.float32)
        grads8 = grads8_out[:, :width], scale_T, grads8_out[:, width:], scale_T
    elif quantize:
        grads8 = new((T, width), FP8), new(T, torch.float32), new((T, width), FP8), new(T, torch.float32)
    grads = GluGrads(dgate_TI, dup_TI, act_TI, *grads8)
    if gate_TI.numel():
        _launch_backward(dact_TI, gate_TI, up_TI, grads, activation, low_rank)
    return grads


class _Glu(torch.autograd.Function):
    """Saves gate and up, which stay the caller's: their gradients get memory of their own."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        gate_TI, up_TI = (x.reshape(-1, x.shape[-1]).contiguous() for x in (gate, up))
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.activation = activation
        return glu_forward(gate_TI, up_TI, activation)[0].view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        (dact,) = grads
        gate_TI, up_TI = ctx.saved_tensors
        dact_TI = dact.reshape(gate_TI.shape).contiguous()
        found = glu_backward(dact_TI, gate_TI, up_TI, ctx.activation, inplace=False, recompute=False)
        return found.dgate_TI.view(dact.shape), found.dup_TI.view(dact.shape), None


# ----------------------------------------------------------------------------------------------------------------------
# Public function


def glu(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """f(gate) * up for gate and up of one shape [..., I] and dtype, computed in fp32 and rounded once."""
    return _Glu.apply(gate, up, activation)


# ----------------------------------------------------------------------------------------------------------------------
# Plain PyTorch


def glu_reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """`glu` in plain PyTorch: differentiable, in the dtype of the inputs."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _with_low_rank(base_TI: Tensor, part: LowRank | None) -> Tensor:
    if part is None:
        return _precise(base_TI)
    return matmul_fp32(part.x_TR, part.b_NR.t().to(part.x_TR.dtype)).add_(base_TI)


def _glu_forward_torch(gate_TI, up_TI, activation, low_rank, quantize):
    gate, up = map(_with_low_rank, (gate_TI, up_TI), low_rank)
    act_TI = glu_reference(gate, up, activation).to(gate_TI.dtype)
    return (act_TI, *quantize_rows_reference(act_TI)) if quantize else (act_TI, None, None)


def _glu_backward_torch(
    dact_TI, gate_TI, up_TI, activation, low_rank, inplace, recompute, act_out, quantize, grads8_out
):
    dact, gate, up = _precise(dact_TI), *map(_with_low_rank, (gate_TI, up_TI), low_rank)
    value = glu_reference(gate, torch.ones_like(gate), activation)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dact * up, gate)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        dgate = torch.ops.aten.gelu_backward(dact * up, gate, approximate=approximate)
    dup, act_TI = dact * value, None
    if recompute:
        act_TI = (torch.empty_like(gate_TI) if act_out is None else act_out).copy_(value * up)
    dgate_TI = gate_TI.copy_(dgate) if inplace else dgate.to(gate_TI.dtype)
    dup_TI = up_TI.copy_(dup) if inplace else dup.to(up_TI.dtype)
    grads = GluGrads(dgate_TI, dup_TI, act_TI)
    if quantize and grads8_out is not None:
        both8, scale_T = quantize_rows_reference(torch.cat((dgate_TI, dup_TI), -1))
        dgate8, dup8 = grads8_out.copy_(both8).chunk(2, -1)
        return grads._replace(dgate8_TI=dgate8, dgate_scale_T=scale_T, dup8_TI=dup8, dup_scale_T=scale_T)
    if quantize:
        return GluGrads(dgate_TI, dup_TI, act_TI, *quantize_rows_reference(dgate_TI), *quantize_rows_reference(dup_TI))
    return grads
