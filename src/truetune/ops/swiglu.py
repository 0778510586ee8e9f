"""Gated activations, act = f(gate) * up: SwiGLU (f = SiLU) and GeGLU (f = GELU) of Shazeer, "GLU Variants Improve
Transformer", 2020.

Forward reads gate and up once, backward reads them and the gradient once, writes both gradients over gate and up, and
makes `act` again on the way, so that a block need not keep it. Everything between a load and a store is fp32. Either
direction also gives its result in FP8 for the GEMM that comes next, in the same launch.

Letters of tensor shapes: T tokens, I intermediate size.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.ops.backend import cdiv, next_power_of_2, tl, triton, use_kernels
from truetune.ops.fp8 import FP8, quantize_rows_reference

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""`gelu_tanh` is Transformers' `gelu_pytorch_tanh`, `gelu` the exact one."""

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    from truetune.ops.fp8 import row_scale

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
    def _glu_forward_kernel(
        gate_ptr, up_ptr, act_ptr, act8_ptr, scale_ptr, gate_stride, up_stride, width, span,
        ACTIVATION: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program for `span` columns of a row: a tile, or, to know the largest before the first is rounded, all."""
        spans = tl.cdiv(width, span)
        row = (tl.program_id(0) // spans).to(tl.int64)
        first = tl.program_id(0) % spans * span
        amax = tl.zeros([BLOCK], tl.float32)
        for start in range(first, first + span, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < width
            gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
            value, _ = _activate(gate, ACTIVATION)
            act = (value * up).to(act_ptr.dtype.element_ty)
            tl.store(act_ptr + row * width + cols, act, mask=mask)
            if QUANTIZE:
                amax = tl.maximum(amax, tl.abs(act.to(tl.float32)))
        if QUANTIZE:
            scale, inverse = row_scale(tl.max(amax, 0))
            tl.store(scale_ptr + row, scale)
            tl.debug_barrier()  # what was stored is loaded again
            for start in range(0, width, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                act = tl.load(act_ptr + row * width + cols, mask=cols < width, other=0.0).to(tl.float32)
                tl.store(act8_ptr + row * width + cols, (act * inverse).to(tl.float8e4nv), mask=cols < width)

    @triton.jit
    def _glu_backward_kernel(
        dact_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, act_ptr, dgate8_ptr, dup8_ptr, dgate_scale_ptr, dup_scale_ptr,
        dact_stride, gate_stride, up_stride, dgate_stride, dup_stride, act_stride, grad8_stride, width, span,
        ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, QUANTIZE: tl.constexpr, ONE_SCALE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Programs as in the forward kernel. dgate may be gate, dup up, and act dact: a tile is loaded, then stored."""
        spans = tl.cdiv(width, span)
        row = (tl.program_id(0) // spans).to(tl.int64)
        first = tl.program_id(0) % spans * span
        dgate_amax = tl.zeros([BLOCK], tl.float32)
        dup_amax = tl.zeros([BLOCK], tl.float32)
        for start in range(first, first + span, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < width
            dact = tl.load(dact_ptr + row * dact_stride + cols, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
            value, slope = _activate(gate, ACTIVATION)
            dgate = (dact * up * slope).to(dgate_ptr.dtype.element_ty)
            dup = (dact * value).to(dup_ptr.dtype.element_ty)
            tl.store(dgate_ptr + row * dgate_stride + cols, dgate, mask=mask)
            tl.store(dup_ptr + row * dup_stride + cols, dup, mask=mask)
            if RECOMPUTE:
                act = (value * up).to(act_ptr.dtype.element_ty)
                tl.store(act_ptr + row * act_stride + cols, act, mask=mask)
            if QUANTIZE:
                dgate_amax = tl.maximum(dgate_amax, tl.abs(dgate.to(tl.float32)))
                dup_amax = tl.maximum(dup_amax, tl.abs(dup.to(tl.float32)))
        if QUANTIZE:
            if ONE_SCALE:
                dgate_amax = tl.maximum(dgate_amax, dup_amax)
                dup_amax = dgate_amax
            dgate_scale, dgate_inverse = row_scale(tl.max(dgate_amax, 0))
            dup_scale, dup_inverse = row_scale(tl.max(dup_amax, 0))
            tl.store(dgate_scale_ptr + row, dgate_scale)
            tl.store(dup_scale_ptr + row, dup_scale)
            tl.debug_barrier()  # what was stored is loaded again
            for start in range(0, width, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                mask = cols < width
                dgate = tl.load(dgate_ptr + row * dgate_stride + cols, mask=mask, other=0.0).to(tl.float32)
                dup = tl.load(dup_ptr + row * dup_stride + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(dgate8_ptr + row * grad8_stride + cols, (dgate * dgate_inverse).to(tl.float8e4nv), mask=mask)
                tl.store(dup8_ptr + row * grad8_stride + cols, (dup * dup_inverse).to(tl.float8e4nv), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers

_TILE, _ROW_TILE = 1024, 2048  # columns: of a program that has one tile, and of one that has a whole row


class GluGrads(NamedTuple):
    """What the backward pass gives. The FP8 tensors and their scales, one a row, are None unless asked for."""

    dgate_TI: Tensor
    dup_TI: Tensor
    act_TI: Tensor | None = None
    dgate8_TI: Tensor | None = None
    dgate_scale_T: Tensor | None = None
    dup8_TI: Tensor | None = None
    dup_scale_T: Tensor | None = None


def _blocks(T: int, width: int, quantize: bool) -> tuple[tuple[int], int, int, int]:
    """The grid, `span`, `BLOCK` and the warps, each thread of which loads 8 elements at once."""
    block = min(_ROW_TILE if quantize else _TILE, next_power_of_2(width))
    span = width if quantize else block
    return (T * cdiv(width, span),), span, block, max(1, block // 256)


def _launch_forward(gate_TI, up_TI, act_TI, act8_TI, scale_T, activation: str) -> None:
    T, width = gate_TI.shape
    quantize = act8_TI is not None
    grid, span, block, warps = _blocks(T, width, quantize)
    with torch.cuda.device_of(gate_TI):
        _glu_forward_kernel[grid](
            gate_TI, up_TI, act_TI, act8_TI, scale_T, gate_TI.stride(0), up_TI.stride(0), width, span,
            ACTIVATION=activation, QUANTIZE=quantize, BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _launch_backward(dact_TI, gate_TI, up_TI, grads: GluGrads, activation: str) -> None:
    T, width = gate_TI.shape
    dgate_TI, dup_TI, act_TI, dgate8_TI, dgate_scale_T, dup8_TI, dup_scale_T = grads
    grid, span, block, warps = _blocks(T, width, dgate8_TI is not None)
    with torch.cuda.device_of(gate_TI):
        _glu_backward_kernel[grid](
            dact_TI, gate_TI, up_TI, dgate_TI, dup_TI, act_TI, dgate8_TI, dup8_TI, dgate_scale_T, dup_scale_T,
            dact_TI.stride(0), gate_TI.stride(0), up_TI.stride(0), dgate_TI.stride(0), dup_TI.stride(0),
            0 if act_TI is None else act_TI.stride(0), 0 if dgate8_TI is None else dgate8_TI.stride(0), width, span,
            ACTIVATION=activation, RECOMPUTE=act_TI is not None, QUANTIZE=dgate8_TI is not None,
            ONE_SCALE=dgate_scale_T is dup_scale_T, BLOCK=block, num_warps=warps,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


def glu_forward(
    gate_TI: Tensor, up_TI: Tensor, activation: Activation, *, quantize: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(act_TI, act8_TI, scale_T) with act = f(gate) * up in gate's dtype, rounded once.

    gate and up have the last dimension contiguous; they may be the halves of one [T, 2I] buffer. With `quantize`, act8
    and scale are `quantize_rows(act)`; otherwise None.
    """
    if not use_kernels(gate_TI):
        return _glu_forward_torch(gate_TI, up_TI, activation, quantize)
    act_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
    act8_TI = torch.empty(gate_TI.shape, dtype=FP8, device=gate_TI.device) if quantize else None
    scale_T = torch.empty(gate_TI.shape[0], dtype=torch.float32, device=gate_TI.device) if quantize else None
    if act_TI.numel():
        _launch_forward(gate_TI, up_TI, act_TI, act8_TI, scale_T, activation)
    return act_TI, act8_TI, scale_T


def glu_backward(
    dact_TI: Tensor,
    gate_TI: Tensor,
    up_TI: Tensor,
    activation: Activation,
    *,
    inplace: bool = True,
    recompute: bool = True,
    act_out: Tensor | None = None,
    quantize: bool = False,
    grads8_out: Tensor | None = None,
) -> GluGrads:
    """The gradients of gate and up, written over them if `inplace`; and `act` again with `recompute`.

    `act_out` takes act, and may be dact. With `quantize` the gradients come in FP8 too, as `quantize_rows` would give
    them: each contiguous and with a scale of its own, for two GEMMs; or, for one GEMM over both, as the halves of
    `grads8_out`, a [T, 2I] buffer, under one scale a row (`dgate_scale_T is dup_scale_T`).
    """
    T, width = gate_TI.shape
    if not use_kernels(gate_TI):
        return _glu_backward_torch(
            dact_TI, gate_TI, up_TI, activation, inplace, recompute, act_out, quantize, grads8_out
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
        _launch_backward(dact_TI, gate_TI, up_TI, grads, activation)
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


def _glu_forward_torch(gate_TI, up_TI, activation, quantize):
    act_TI = glu_reference(_precise(gate_TI), _precise(up_TI), activation).to(gate_TI.dtype)
    return (act_TI, *quantize_rows_reference(act_TI)) if quantize else (act_TI, None, None)


def _glu_backward_torch(dact_TI, gate_TI, up_TI, activation, inplace, recompute, act_out, quantize, grads8_out):
    dact, gate, up = map(_precise, (dact_TI, gate_TI, up_TI))
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
