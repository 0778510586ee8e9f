"""The fused decoder layer: what a layer of `families.py` computes, in four autograd nodes.

    q, k, v, residual = project_qkv(x)      norm, projections with their adapters, q/k-norm, rotary embedding
    attended          = the model's own attention function
    x                 = project_out(attended, residual)      projection, post-norm, residual
    x                 = mlp(x)              norm, gate and up, activation, down, post-norm, residual

Saved for the backward pass are the residual stream, q/k/v before their norm, the attention's output, gate and up, and
the adapters' small products; norms and the activation product are made again. Parameters are read from PEFT's and
Transformers' modules at every call, and none are owned here.

T: tokens, H: hidden size, N: features of a projection, I: intermediate size, K: rows that the loss needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.ops.fp8 import FP8
from truetune.ops.lora import (
    Linear,
    Quantized,
    draw_seeds,
    from_row,
    linears_backward_input,
    linears_backward_parameters,
    linears_forward,
    products_with_adapters,
)
from truetune.ops.low_rank import NormedRows
from truetune.ops.rms_norm import rms_norm_backward, rms_norm_forward
from truetune.ops.rope import rope_backward, rope_forward
from truetune.ops.rows import add_rows_, put_rows
from truetune.ops.swiglu import Activation, glu_backward, glu_forward

RECOMPUTED_ROWS = 4096  # enough for full GEMMs, few enough that gate and up stay small


class Norm(NamedTuple):
    """An RMSNorm as it is in the model: y = x / rms(x) * (offset + weight)."""

    weight_H: Tensor
    eps: float
    offset: float

    def forward(
        self, x_TH: Tensor, dtype: torch.dtype, residual_TH: Tensor | None = None, quantize: bool = False
    ) -> tuple[Tensor, Tensor, Quantized | None]:
        """(y, or residual + y where there is one; 1 / rms [T]; y in FP8 where that is asked for)."""
        done = rms_norm_forward(
            x_TH, self.weight_H.detach(), self.eps,
            offset=self.offset, residual_TH=residual_TH, out_dtype=dtype, quantize=quantize,
        )  # fmt: skip
        return done.y, done.rstd_T, quantized_or_none(done.y8, done.scale_T)

    def backward(
        self, dy_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, dresidual_TH: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return rms_norm_backward(
            dy_TH, x_TH, self.weight_H.detach(), rstd_T,
            offset=self.offset, dresidual_TH=dresidual_TH, needs_weight=self.weight_H.requires_grad,
        )  # fmt: skip


def quantized_or_none(x8_TK: Tensor | None, scale_T: Tensor | None) -> Quantized | None:
    return None if x8_TK is None or scale_T is None else Quantized(x8_TK, scale_T)


def trained_tensors(norms: Sequence[Norm | None], linears: Sequence[Linear]) -> list[Tensor | None]:
    """What an autograd function takes after its own arguments, in the order in which it gives gradients."""
    return [
        *(None if norm is None else norm.weight_H for norm in norms),
        *(tensor for linear in linears for tensor in linear.tensors()),
    ]


def _contiguous_rows(x: Tensor) -> Tensor:
    """Kernels take rows at any stride, but not their elements: gradients of `sum()` and of eager attention's keys do
    not come so."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _first_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a fused block has no second derivative: call backward without create_graph=True.")


def _once(ctx: Any) -> None:
    _first_derivative()
    if ctx.done:
        raise RuntimeError("a fused block's saved tensors are gone after its first backward pass: run forward again.")
    ctx.done = True


# -- attention ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class QkvProjection:
    """From the residual stream to what attention takes. `rows_K`: only these get queries (the last layer).

    `owns_gradients`: nobody else reads the gradients of q and k, which are then rotated where they lie.
    """

    norm: Norm | None
    linears: list[Linear]  # q, k, v; or one whose output holds them one after the other
    widths: tuple[int, int, int]  # features of q, k and v
    head_dim: int
    q_norm: Norm | None
    k_norm: Norm | None
    norm_rows: bool  # q/k-norm over the whole row, not over a head
    dtype: torch.dtype
    owns_gradients: bool = False
    rows_K: Tensor | None = None

    def __call__(self, x_TH: Tensor, cos_TR: Tensor | None, sin_TR: Tensor | None) -> tuple[Tensor, ...]:
        """x [T, H] -> q, k, v [T, heads, D] in `dtype`, and x for the residual path."""
        draw_seeds(self.linears)
        norms = (self.norm, self.q_norm, self.k_norm)
        trained = trained_tensors(norms, self.linears)
        return _ProjectQkv.apply(_contiguous_rows(x_TH), cos_TR, sin_TR, self, *trained)


class _ProjectQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, cos_TR, sin_TR, block: QkvProjection, *_):
        h_TH, rstd_T, h8 = _normed(block.norm, x_TH, block.dtype, block.linears)
        q_TN, k_TN, v_TN, xas = _qkv_forward(block, h_TH, h8)
        q_rstd = k_rstd = None
        q, k = (x.unflatten(-1, (-1, block.head_dim)) for x in (q_TN, k_TN))
        normed: tuple[Tensor | None, ...] = (None, None)  # q and k as they come out of their projections
        if block.norm_rows and block.q_norm is not None and block.k_norm is not None:
            q_TN, q_rstd = block.q_norm.forward(q_TN, block.dtype)[:2]
            k_TN, k_rstd = block.k_norm.forward(k_TN, block.dtype)[:2]
            normed = (q.flatten(1), k.flatten(1))
            q, k = (x.unflatten(-1, (-1, block.head_dim)) for x in (q_TN, k_TN))
        elif block.q_norm is not None:
            normed = (q, k)
        if cos_TR is not None:
            q, k = _rope_forward(block, q, k, cos_TR, sin_TR)
        ctx.save_for_backward(x_TH, rstd_T, cos_TR, sin_TR, *normed, q_rstd, k_rstd, *xas)
        ctx.block, ctx.done = block, False
        return q, k, v_TN.unflatten(-1, (-1, block.head_dim)), x_TH.view_as(x_TH)

    @staticmethod
    def backward(ctx, dq, dk, dv, dresidual_TH):
        _once(ctx)
        x_TH, rstd_T, cos_TR, sin_TR, q, k, q_rstd, k_rstd, *xas = ctx.saved_tensors
        block: QkvProjection = ctx.block
        dq, dk, dv, dresidual_TH = map(_contiguous_rows, (dq, dk, dv, dresidual_TH))
        d_qn = d_kn = None
        if cos_TR is not None:
            dq, dk, d_qn, d_kn = _rope_backward(block, dq, dk, cos_TR, sin_TR, q, k)
        dq_TN, dk_TN, dv_TN = (x.flatten(1) for x in (dq, dk, dv))
        if block.norm_rows and block.q_norm is not None and block.k_norm is not None:
            dq_TN, d_qn = block.q_norm.backward(dq_TN, q, q_rstd)
            dk_TN, d_kn = block.k_norm.backward(dk_TN, k, k_rstd)
        h = _normed_again(block.norm, x_TH, rstd_T, block.dtype)
        needs_input = ctx.needs_input_grad[0] or (block.norm is not None and block.norm.weight_H.requires_grad)
        dh_TH, gradients = _qkv_backward(block, (dq_TN, dk_TN, dv_TN), h, xas, needs_input)
        dx_TH, d_norm = _norm_backward(block.norm, dh_TH, x_TH, rstd_T, dresidual_TH)
        return dx_TH, None, None, None, d_norm, d_qn, d_kn, *gradients


def _normed(
    norm: Norm | None, x_TH: Tensor, dtype: torch.dtype, linears: Sequence[Linear] = ()
) -> tuple[Tensor, Tensor | None, Quantized | None]:
    """What the linears take, also in FP8 where they are."""
    if norm is None:
        return x_TH.to(dtype), None, None
    return norm.forward(x_TH, dtype, quantize=any(linear.weight.fp8 for linear in linears))


def _normed_again(norm: Norm | None, x_TH: Tensor, rstd_T: Tensor | None, dtype: torch.dtype) -> Tensor | NormedRows:
    """For the backward pass, where most adapters need no tensor of it."""
    if norm is None or rstd_T is None:
        return x_TH.to(dtype)
    return NormedRows(x_TH, rstd_T, norm.weight_H.detach(), norm.offset, lambda rows: norm.forward(rows, dtype)[0])


def _norm_backward(norm, dh_TH, x_TH, rstd_T, dresidual_TH) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of x: through the norm, and down the residual path."""
    if dh_TH is None:
        return dresidual_TH, None
    if norm is not None:
        return norm.backward(dh_TH, x_TH, rstd_T, dresidual_TH)
    dx_TH = dh_TH.to(x_TH.dtype)
    return (dx_TH if dresidual_TH is None else dx_TH + dresidual_TH), None


def _qkv_forward(
    block: QkvProjection, h_TH: Tensor, h8: Quantized | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...]]:
    if len(block.linears) == 1:
        (qkv_TN,), xa_TS = linears_forward(h_TH, block.linears, quantized=h8)
        return *qkv_TN.split(block.widths, 1), (xa_TS, None)
    if block.rows_K is None:
        (q_TN, k_TN, v_TN), xa_TS = linears_forward(h_TH, block.linears, quantized=h8)
        return q_TN, k_TN, v_TN, (xa_TS, None)
    (q_KN,), q_xa = linears_forward(h_TH.index_select(0, block.rows_K), block.linears[:1])
    (k_TN, v_TN), kv_xa = linears_forward(h_TH, block.linears[1:], quantized=h8)
    return put_rows(q_KN, block.rows_K, len(h_TH)), k_TN, v_TN, (kv_xa, q_xa)


def _qkv_backward(block: QkvProjection, dys, h, xas, needs_input: bool) -> tuple[Tensor | None, list[Tensor | None]]:
    if len(block.linears) == 1:
        dys = (torch.cat(dys, 1),)
    if block.rows_K is None or len(block.linears) == 1:
        dh_TH, adapters = linears_backward_input(dys, xas[0], block.linears, needs_input=needs_input)
        return dh_TH, linears_backward_parameters(dys, h, xas[0], adapters, block.linears)
    q, kv, kv_dys, q_dys = block.linears[:1], block.linears[1:], dys[1:], (dys[0].index_select(0, block.rows_K),)
    dh_KH, q_adapters = linears_backward_input(q_dys, xas[1], q, needs_input=needs_input)
    q_gradients = linears_backward_parameters(q_dys, _take_normed(h, block.rows_K), xas[1], q_adapters, q)
    del q_dys  # before there is a gradient of all rows
    dh_TH, kv_adapters = linears_backward_input(kv_dys, xas[0], kv, needs_input=needs_input)
    if dh_TH is not None and dh_KH is not None:
        add_rows_(dh_TH, dh_KH, block.rows_K)
    return dh_TH, q_gradients + linears_backward_parameters(kv_dys, h, xas[0], kv_adapters, kv)


def _head_norms(block: QkvProjection) -> dict[str, Any]:
    if block.q_norm is None or block.k_norm is None or block.norm_rows:
        return {}
    return {
        "q_weight": block.q_norm.weight_H.detach(),
        "k_weight": block.k_norm.weight_H.detach(),
        "eps": block.q_norm.eps,
        "offset": block.q_norm.offset,
    }


def _rope_forward(block: QkvProjection, q, k, cos_TR, sin_TR) -> tuple[Tensor, Tensor]:
    norms = _head_norms(block)
    # In place where nobody needs q and k as they were before.
    return rope_forward(q, k, cos_TR, sin_TR, inplace=block.q_norm is None, **norms)


def _rope_backward(block: QkvProjection, dq, dk, cos_TR, sin_TR, q, k):
    norms = _head_norms(block)
    if norms:
        trained = any(norm is not None and norm.weight_H.requires_grad for norm in (block.q_norm, block.k_norm))
        norms |= {"q": q, "k": k, "needs_weight": trained}
    return rope_backward(dq, dk, cos_TR, sin_TR, inplace=block.owns_gradients, **norms)


@dataclass(slots=True)
class ResidualProjection:
    """From attention back to the residual stream: residual + multiplier * post_norm(linear(x)).

    `rows_K`: only these go on (the last layer). All of x is saved, as flash attention saves it anyway.
    """

    linear: Linear
    post_norm: Norm | None
    multiplier: float
    rows_K: Tensor | None = None

    def __call__(self, x_TN: Tensor, residual_TH: Tensor) -> Tensor:
        """x [T, N] and the residual path [T, H] -> [T, H], or [K, H]."""
        draw_seeds((self.linear,))
        trained = trained_tensors((self.post_norm,), (self.linear,))
        return _ProjectOut.apply(_contiguous_rows(x_TN), _contiguous_rows(residual_TH), self, *trained)


def _into_residual(
    x_TN: Tensor,
    residual_TH: Tensor,
    linear: Linear,
    post_norm: Norm | None,
    multiplier: float,
    quantized: Quantized | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(the new residual stream, scaling * x @ A.T, and what a post-norm needs in the backward pass)."""
    if post_norm is None and multiplier == 1.0:
        (out_TH,), xa_TS = linears_forward(x_TN, (linear,), residual_TN=residual_TH, quantized=quantized)
        return out_TH, xa_TS, None, None
    (y_TH,), xa_TS = linears_forward(x_TN, (linear,), quantized=quantized)
    if post_norm is None:
        return torch.add(residual_TH, y_TH, alpha=multiplier), xa_TS, None, None
    out_TH, rstd_T, _ = post_norm.forward(y_TH, residual_TH.dtype, residual_TH)
    return out_TH, xa_TS, y_TH, rstd_T


def _from_residual(
    dout_TH: Tensor, dtype: torch.dtype, post_norm: Norm | None, multiplier: float, y_TH, rstd_T
) -> tuple[Tensor, Tensor | None]:
    """(the gradient of the linear's result, that of the post-norm's weight)."""
    if post_norm is not None:
        return post_norm.backward(dout_TH, y_TH, rstd_T)
    return (dout_TH if multiplier == 1.0 else dout_TH * multiplier).to(dtype), None


class _ProjectOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TN, residual_TH, block: ResidualProjection, *_):
        x_KN, residual_KH = _take(x_TN, block.rows_K), _take(residual_TH, block.rows_K)
        out_KH, xa_KS, y_KH, rstd_K = _into_residual(x_KN, residual_KH, block.linear, block.post_norm, block.multiplier)
        ctx.save_for_backward(x_TN, xa_KS, y_KH, rstd_K)
        ctx.block = block
        return out_KH

    @staticmethod
    def backward(ctx, dout_KH):
        _first_derivative()
        x_TN, xa_KS, y_KH, rstd_K = ctx.saved_tensors
        block: ResidualProjection = ctx.block
        dout_KH = _contiguous_rows(dout_KH)
        dy_KH, d_norm = _from_residual(dout_KH, x_TN.dtype, block.post_norm, block.multiplier, y_KH, rstd_K)
        linears = (block.linear,)
        dx_KN, adapters = linears_backward_input((dy_KH,), xa_KS, linears, needs_input=ctx.needs_input_grad[0])
        gradients = linears_backward_parameters((dy_KH,), _take(x_TN, block.rows_K), xa_KS, adapters, linears)
        if block.rows_K is None:
            return dx_KN, dout_KH, None, d_norm, *gradients
        dx_TN = None if dx_KN is None else put_rows(dx_KN, block.rows_K, len(x_TN))
        dresidual_TH = put_rows(dout_KH, block.rows_K, len(x_TN)) if ctx.needs_input_grad[1] else None
        return dx_TN, dresidual_TH, None, d_norm, *gradients


def _take(x_TH: Tensor, rows_K: Tensor | None) -> Tensor:
    return x_TH if rows_K is None else x_TH.index_select(0, rows_K)


def _take_normed(h: Tensor | NormedRows, rows_K: Tensor) -> Tensor | NormedRows:
    if isinstance(h, Tensor):
        return h.index_select(0, rows_K)
    return h._replace(x_TK=h.x_TK.index_select(0, rows_K), rstd_T=h.rstd_T.index_select(0, rows_K))


# -- MLP ---------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class GatedMlp:
    """residual + multiplier * post_norm(down(activation(gate(h)) * up(h))), h = norm(residual).

    `recompute`: only the residual stream is saved, and the backward pass makes gate and up again, some rows at a time.
    `unused`: the layer runs again for what its nodes save, of which its result is no part: it is not computed.
    """

    norm: Norm | None
    gate_up: list[Linear]  # gate, up; or one whose output holds them one after the other
    activation: Activation
    down: Linear
    post_norm: Norm | None
    multiplier: float
    dtype: torch.dtype
    recompute: bool = False
    unused: bool = False

    def __call__(self, x_TH: Tensor) -> Tensor:
        draw_seeds((*self.gate_up, self.down))
        norms = (self.norm, self.post_norm)
        return _Mlp.apply(_contiguous_rows(x_TH), self, *trained_tensors(norms, (*self.gate_up, self.down)))

    def prepared(self) -> "GatedMlp":
        gate_up = [linear.prepared(self.dtype) for linear in self.gate_up]
        return replace(self, gate_up=gate_up, down=self.down.prepared(self.dtype))

    def from_row(self, first: int) -> "GatedMlp":
        """The same block for the rows from `first` on."""
        return replace(self, gate_up=from_row(self.gate_up, first), down=from_row((self.down,), first)[0])

    def row_blocks(self, x_TH: Tensor) -> list[slice]:
        """The rows that are recomputed at a time. All of them where a weight is trained, whose gradient is one product,
        and on a CPU, where a product's bits depend on its rows."""
        trained = any(linear.weight.trained is not None for linear in (*self.gate_up, self.down))
        rows = max(1, len(x_TH)) if trained or not x_TH.is_cuda else RECOMPUTED_ROWS
        return [slice(start, start + rows) for start in range(0, len(x_TH), rows)]


def _mlp_forward(block: GatedMlp, x_TH: Tensor) -> tuple[Tensor, list[Any]]:
    """(the new residual stream, what `_mlp_backward` needs beside x)."""
    h_TH, rstd_T, h8 = _normed(block.norm, x_TH, block.dtype, block.gate_up)
    gate_up, xa_TS = linears_forward(h_TH, block.gate_up, quantized=h8)
    act_TI, act8_TI, scale_T = glu_forward(*_halves(gate_up), block.activation, quantize=block.down.weight.fp8)
    quantized = quantized_or_none(act8_TI, scale_T)
    out_TH, down_xa, y_TH, y_rstd = _into_residual(
        act_TI, x_TH, block.down, block.post_norm, block.multiplier, quantized
    )
    return out_TH, [rstd_T, xa_TS, down_xa, y_TH, y_rstd, *gate_up]


def _mlp_made_again(block: GatedMlp, x_TH: Tensor) -> list[Any]:
    """What `_mlp_forward` leaves for `_mlp_backward`; without the product with down, unless a norm comes after it."""
    if block.post_norm is not None:
        return _mlp_forward(block, x_TH)[1]
    h_TH, rstd_T, h8 = _normed(block.norm, x_TH, block.dtype, block.gate_up)
    gate_up, xa_TS = linears_forward(h_TH, block.gate_up, quantized=h8)
    return [rstd_T, xa_TS, None, None, None, *gate_up]


def _mlp_backward(
    block: GatedMlp, dout_TH: Tensor, x_TH: Tensor, saved: Sequence[Any], needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(the gradient of x, those of all parameters). gate and up become their own gradients."""
    rstd_T, xa_TS, down_xa, y_TH, y_rstd, *gate_up = saved
    dy_TH, d_post = _from_residual(dout_TH, block.dtype, block.post_norm, block.multiplier, y_TH, y_rstd)
    dact_TI, down_adapters = linears_backward_input((dy_TH,), down_xa, (block.down,))
    assert dact_TI is not None
    fp8 = all(linear.weight.fp8 for linear in block.gate_up)
    both8 = torch.empty_like(gate_up[0], dtype=FP8) if fp8 and len(gate_up) == 1 else None
    grads = glu_backward(dact_TI, *_halves(gate_up), block.activation, act_out=dact_TI, quantize=fp8, grads8_out=both8)
    act_TI = dact_TI  # where it was made again
    quantized = [quantized_or_none(both8, grads.dgate_scale_T)]
    if len(gate_up) == 2:
        pairs = ((grads.dgate8_TI, grads.dgate_scale_T), (grads.dup8_TI, grads.dup_scale_T))
        quantized = [quantized_or_none(*pair) for pair in pairs]
    if down_xa is None:
        down_xa = products_with_adapters(act_TI, (block.down,))
    down_gradients = linears_backward_parameters((dy_TH,), act_TI, down_xa, down_adapters, (block.down,))
    del grads, act_TI, dact_TI
    h = _normed_again(block.norm, x_TH, rstd_T, block.dtype)
    needs_input = needs_input or (block.norm is not None and block.norm.weight_H.requires_grad)
    dh_TH, adapters = linears_backward_input(
        gate_up, xa_TS, block.gate_up, needs_input=needs_input, quantized=quantized
    )
    del quantized
    gradients = linears_backward_parameters(gate_up, h, xa_TS, adapters, block.gate_up)
    dx_TH, d_norm = _norm_backward(block.norm, dh_TH, x_TH, rstd_T, dout_TH)
    return dx_TH, [d_norm, d_post, *gradients, *down_gradients]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, block: GatedMlp, *_):
        ctx.block, ctx.done = block, False
        if not block.recompute:
            out_TH, saved = _mlp_forward(block, x_TH)
            ctx.save_for_backward(x_TH, *saved)
            return out_TH
        ctx.save_for_backward(x_TH)
        out_TH = torch.empty_like(x_TH)
        if block.unused:
            return out_TH
        prepared = block.prepared()
        for rows in block.row_blocks(x_TH):
            out_TH[rows] = _mlp_forward(prepared.from_row(rows.start), x_TH[rows])[0]
        return out_TH

    @staticmethod
    def backward(ctx, dout_TH):
        _once(ctx)
        x_TH, *saved = ctx.saved_tensors
        block: GatedMlp = ctx.block
        dout_TH, needs_input = _contiguous_rows(dout_TH), ctx.needs_input_grad[0]
        if not block.recompute:
            dx_TH, gradients = _mlp_backward(block, dout_TH, x_TH, saved, needs_input)
            return dx_TH, None, *gradients
        prepared = block.prepared()
        totals: list[Tensor | None] = []
        dx_TH = torch.empty_like(x_TH) if needs_input else None
        for rows in block.row_blocks(x_TH):
            part = prepared.from_row(rows.start)
            saved = _mlp_made_again(part, x_TH[rows])
            dx_rows, gradients = _mlp_backward(part, dout_TH[rows], x_TH[rows], saved, needs_input)
            if dx_TH is not None and dx_rows is not None:
                dx_TH[rows] = dx_rows
            totals = [_sum(total, new) for total, new in zip(totals, gradients, strict=True)] if totals else gradients
        return dx_TH, None, *totals


def _sum(total: Tensor | None, new: Tensor | None) -> Tensor | None:
    return new if total is None else total if new is None else total.add_(new)


def _halves(gate_up: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return tuple(gate_up[0].chunk(2, 1)) if len(gate_up) == 1 else tuple(gate_up)  # type: ignore[return-value]
