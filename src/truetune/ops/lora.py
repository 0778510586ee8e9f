"""Linear layers that share their input, with LoRA beside any of them: q, k and v; gate and up; o; down.

Written once over the two products that each kind of weight brings (`Weight`): x @ W.T and dy @ W. On Hopper
`dense_sum` makes them with all that is added to them, in bf16, and `fp8_sum` in FP8. Elsewhere the adapter's product
goes into the result first, and the GEMM adds the weight's to it, so that no pass over the result is spent on the sum. A
product that goes into the residual stream comes first, because the adapter's part is for many steps smaller than half a
bf16 place of the stream: rounded onto it before the weight's product is there, it would be lost in every element, and
the adapter would learn more slowly; in one fp32 sum of the three it survives on average. LoRA: Hu et al.,
arXiv:2106.09685.

Letters of tensor shapes: T tokens, K input features, N output features of one linear, R rank, S the sum of all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from truetune.ops.dense_sum import dense_sum, sums_in_one_launch
from truetune.ops.dropout import seeded_dropout
from truetune.ops.fp8 import Fp8Product, Fp8Weight, quantize_rows
from truetune.ops.fp8_sum import fp8_sum
from truetune.ops.low_rank import (
    LowRank,
    NormedRows,
    low_rank_backward,
    low_rank_product,
    matmul_fp32,
    outer,
    outers,
    project,
)
from truetune.ops.nf4 import dequantize_nf4
from truetune.ops.rounding import rounded

# ----------------------------------------------------------------------------------------------------------------------
# Weights


def _add_product(out_TN: Tensor | None, x_TK: Tensor, weight_KN: Tensor) -> Tensor:
    """out + x @ weight, in place where there is an `out`; a wider `out` is summed in its own dtype."""
    if out_TN is None:
        return x_TK @ weight_KN
    if out_TN.dtype == x_TK.dtype:
        return out_TN.addmm_(x_TK, weight_KN)
    if out_TN.is_cuda:
        return torch.addmm(out_TN, x_TK, weight_KN, out_dtype=out_TN.dtype, out=out_TN)
    return out_TN.add_(x_TK @ weight_KN)


class Quantized(NamedTuple):
    """Rows in FP8 beside the tensor that they were made of: x ~ x8 * scale."""

    x8_TK: Tensor
    scale_T: Tensor


class Weight(Protocol):
    """What stands behind a linear: the two products with it. x and dy give the dtype; `fp8`: they are those of
    `quantized`."""

    @property
    def out_features(self) -> int: ...

    @property
    def trained(self) -> Tensor | None: ...

    @property
    def fp8(self) -> bool: ...

    def times(
        self, x_TK: Tensor, quantized: Quantized | None, low_rank: LowRank | None, residual_TN: Tensor | None
    ) -> Tensor:
        """x @ W.T, what `low_rank` gives, and the residual, which stays as it is and gives the dtype."""
        ...

    def transposed_times(self, dy_TN: Tensor, out_TK: Tensor | None, quantized: Quantized | None) -> Tensor:
        """dy @ W, added to `out` where there is one, whose memory may become the result's."""
        ...

    def prepared(self, dtype: torch.dtype) -> "Weight":
        """The same weight, with what several products in a row would each do done once."""
        ...


class DenseWeight(NamedTuple):
    """bf16, fp16 or fp32, trained or frozen; rounded to the activation's dtype where autocast is on."""

    weight_NK: Tensor

    @property
    def out_features(self) -> int:
        return self.weight_NK.shape[0]

    @property
    def trained(self) -> Tensor | None:
        return self.weight_NK if self.weight_NK.requires_grad else None

    @property
    def fp8(self) -> bool:
        return False

    def times(self, x_TK, quantized=None, low_rank: LowRank | None = None, residual_TN=None) -> Tensor:
        weight_KN = self.weight_NK.detach().to(x_TK.dtype).t()
        if sums_in_one_launch([(x_TK, weight_KN)], low_rank, residual_TN):
            return dense_sum([(x_TK, weight_KN)], low_rank=low_rank, add_TN=residual_TN)
        if low_rank is None:
            return _add_product(None if residual_TN is None else residual_TN.clone(), x_TK, weight_KN)
        if residual_TN is not None:
            return low_rank_product(*low_rank, (x_TK @ weight_KN, residual_TN), torch.empty_like(residual_TN))
        out_TN = low_rank_product(*low_rank, (), x_TK.new_empty(len(x_TK), self.out_features))
        return _add_product(out_TN, x_TK, weight_KN)

    def transposed_times(self, dy_TN, out_TK, quantized=None) -> Tensor:
        return _add_product(out_TK, dy_TN, self.weight_NK.detach().to(dy_TN.dtype))

    def prepared(self, dtype: torch.dtype) -> "DenseWeight":
        return self if self.trained is not None else DenseWeight(self.weight_NK.to(dtype))


class Nf4Weight(NamedTuple):
    """bitsandbytes' 4-bit weight, frozen; made dense for each product."""

    packed: Tensor
    quant_state: Any

    @property
    def trained(self) -> Tensor | None:
        return None

    @property
    def fp8(self) -> bool:
        return False

    @property
    def out_features(self) -> int:
        return self.quant_state.shape[0]

    def times(self, x_TK, quantized=None, low_rank: LowRank | None = None, residual_TN=None) -> Tensor:
        return self.prepared(x_TK.dtype).times(x_TK, None, low_rank, residual_TN)

    def transposed_times(self, dy_TN, out_TK, quantized=None) -> Tensor:
        return self.prepared(dy_TN.dtype).transposed_times(dy_TN, out_TK)

    def prepared(self, dtype: torch.dtype) -> DenseWeight:
        return DenseWeight(dequantize_nf4(self.packed, self.quant_state, dtype))


class QuantizedWeight(NamedTuple):
    """An FP8 weight, frozen."""

    weight: Fp8Weight

    @property
    def trained(self) -> Tensor | None:
        return None

    @property
    def fp8(self) -> bool:
        return True

    @property
    def out_features(self) -> int:
        return self.weight.weight8_NK.shape[0]

    def transposed_product(self, dy: Quantized | None) -> Fp8Product:
        assert dy is not None
        return self.weight.transposed_times(*dy)

    def times(self, x_TK, quantized=None, low_rank: LowRank | None = None, residual_TN=None) -> Tensor:
        assert quantized is not None
        return fp8_sum([self.weight.times(*quantized)], low_rank=low_rank, add_TN=residual_TN, dtype=x_TK.dtype)

    def transposed_times(self, dy_TN, out_TK, quantized=None) -> Tensor:
        return fp8_sum([self.transposed_product(quantized)], add_TN=out_TK, dtype=dy_TN.dtype)

    def prepared(self, dtype: torch.dtype) -> "QuantizedWeight":
        return self


@dataclass(slots=True)
class Linear:
    """One linear: x @ W.T + bias + scaling * (dropout(x) @ A.T) @ B.T, the last where there is an adapter.

    `seed` decides what drops out, and is drawn for each forward pass (`draw_seeds`).
    """

    weight: Weight
    bias_N: Tensor | None = None
    a_RK: Tensor | None = None
    b_NR: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What may be trained, in the order in which `linears_backward_parameters` gives gradients."""
        return self.weight.trained, self.bias_N, self.a_RK, self.b_NR

    def prepared(self, dtype: torch.dtype) -> "Linear":
        return replace(self, weight=self.weight.prepared(dtype))

    def dropped_out(self, x_TK: Tensor, add_TK: Tensor | None = None) -> Tensor:
        """What the adapter takes of x; and of its gradient, `add_TK` added."""
        if self.dropout == 0:
            return x_TK if add_TK is None else x_TK.add_(add_TK)
        return seeded_dropout(x_TK, self.dropout, self.seed, add_TK=add_TK)


def draw_seeds(linears: Sequence[Linear]) -> None:
    """New masks for a forward pass, from torch's generator on the CPU: the device is not asked."""
    for linear in linears:
        if linear.dropout > 0:
            linear.seed = int(torch.randint(2**62, ()))


def from_row(linears: Sequence[Linear], first: int) -> list[Linear]:
    """The same linears for the rows from `first` on, whose masks are those that they have among all rows."""
    return [replace(linear, seed=linear.seed + first) if linear.dropout > 0 else linear for linear in linears]


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward, for the autograd functions of whole blocks


class _Matrices(NamedTuple):
    """All A times their scaling, one below the other, in the activation's dtype; and each linear's B, in it or not."""

    a_SK: Tensor
    bs: list[Tensor | None]


def _rounded(linears: Sequence[Linear], dtype: torch.dtype, *, with_b: bool = False) -> _Matrices | None:
    """None without an adapter; not `with_b`, B stays as it is."""
    adapted = [linear for linear in linears if linear.a_RK is not None]
    if not adapted:
        return None
    parts: list[Tensor] = [linear.a_RK.detach() for linear in adapted]  # type: ignore[union-attr]
    factors = [linear.scaling for linear in adapted]
    bs: list[Tensor | None] = [None if linear.b_NR is None else linear.b_NR.detach() for linear in linears]
    to_round = [b_NR for b_NR in bs if with_b and b_NR is not None and b_NR.dtype != dtype]
    if len(parts) == 1 and parts[0].dtype == dtype and factors == [1.0] and not to_round:
        return _Matrices(parts[0], bs)
    flat = rounded([*parts, *to_round], [*factors, *[1.0] * len(to_round)], dtype)
    a, *others = flat.split([sum(part.numel() for part in parts), *(b_NR.numel() for b_NR in to_round)])
    done = {id(b_NR): other.view(b_NR.shape) for b_NR, other in zip(to_round, others, strict=True)}
    return _Matrices(a.view(-1, parts[0].shape[1]), [done.get(id(b_NR), b_NR) for b_NR in bs])


def _rank_slices(linears: Sequence[Linear]) -> list[slice]:
    """Where each linear's ranks lie in S; empty where it has no adapter."""
    slices, start = [], 0
    for linear in linears:
        end = start + (0 if linear.a_RK is None else linear.a_RK.shape[0])
        slices.append(slice(start, end))
        start = end
    return slices


def _adapted(linears: Sequence[Linear]) -> list[tuple[Linear, slice]]:
    pairs = zip(linears, _rank_slices(linears), strict=True)
    return [(linear, ranks) for linear, ranks in pairs if linear.a_RK is not None]


def _drops_out(linears: Sequence[Linear]) -> bool:
    return any(linear.dropout > 0 and linear.a_RK is not None for linear in linears)


def _products_with_a(x_TK: Tensor, linears: Sequence[Linear], a_SK: Tensor) -> Tensor:
    """x @ A.T [T, S]; with dropout, which is another for each adapter, one after the other."""
    if not _drops_out(linears):
        return project(x_TK, a_SK)
    return torch.cat([linear.dropped_out(x_TK) @ a_SK[ranks].t() for linear, ranks in _adapted(linears)], 1)


def _gradient_through_a(dxa_TS: Tensor, linears: Sequence[Linear], a_SK: Tensor) -> Tensor:
    """The gradient [T, K] of x down the adapters' way, with dropout."""
    total: Tensor | None = None
    for linear, ranks in _adapted(linears):
        total = linear.dropped_out(dxa_TS[:, ranks] @ a_SK[ranks], total)
    assert total is not None
    return total


def _gradients_of_a_and_b(
    dxa_TS: Tensor, x: Tensor | NormedRows, linears: Sequence[Linear], of_b: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """[S, K] in fp32, not yet times the scaling; and dy.T @ xa [N, R] of every xa and dy in `of_b`."""
    if not _drops_out(linears):
        return outers(dxa_TS, x, of_b)
    x_TK = x.made() if isinstance(x, NormedRows) else x
    parts = [matmul_fp32(dxa_TS[:, ranks].t(), linear.dropped_out(x_TK)) for linear, ranks in _adapted(linears)]
    return [torch.cat(parts), *(outer(xa_TR, dy_TN, by_rank=False) for xa_TR, dy_TN in of_b)]


def quantized_if_needed(x_TK: Tensor, linears: Sequence[Linear], given: Quantized | None = None) -> Quantized | None:
    if not any(linear.weight.fp8 for linear in linears):
        return None
    return Quantized(*quantize_rows(x_TK)) if given is None else given


def products_with_adapters(x_TK: Tensor, linears: Sequence[Linear]) -> Tensor | None:
    """scaling * x @ A.T [T, S] of all adapters, in the dtype of x; None without one."""
    matrices = _rounded(linears, x_TK.dtype)
    return None if matrices is None else _products_with_a(x_TK, linears, matrices.a_SK)


def linears_forward(
    x_TK: Tensor,
    linears: Sequence[Linear],
    *,
    residual_TN: Tensor | None = None,
    quantized: Quantized | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """The results [T, N] of all linears in the dtype of x, and scaling * x @ A.T [T, S] for the backward pass.

    `residual_TN`: what is added to every result, which then has its dtype. `quantized`: x in FP8, where it was made.
    """
    matrices = _rounded(linears, x_TK.dtype, with_b=True)
    xa_TS = None if matrices is None else _products_with_a(x_TK, linears, matrices.a_SK)
    bs: list[Tensor | None] = [None] * len(linears) if matrices is None else matrices.bs
    quantized = quantized_if_needed(x_TK, linears, quantized)
    results = []
    for linear, b_NR, ranks in zip(linears, bs, _rank_slices(linears), strict=True):
        low_rank = None if b_NR is None or xa_TS is None else (xa_TS[:, ranks], b_NR)
        out = linear.weight.times(x_TK, quantized, low_rank, residual_TN)
        results.append(out if linear.bias_N is None else out.add_(linear.bias_N.detach()))
    return results, xa_TS


class AdapterGradients(NamedTuple):
    """dy @ B [T, S] of all adapters, and each linear's gradient of B, where it was made with it."""

    dxa_TS: Tensor
    d_bs: list[Tensor | None]


def _through_b(dys: Sequence[Tensor], xa_TS: Tensor | None, linears: Sequence[Linear]) -> AdapterGradients | None:
    parts, d_bs = [], []
    for dy_TN, linear, ranks in zip(dys, linears, _rank_slices(linears), strict=True):
        d_b = None
        if linear.b_NR is not None:
            if xa_TS is None:
                dxa_TR = project(dy_TN, linear.b_NR.detach().t())
            else:
                dxa_TR, d_b = low_rank_backward(dy_TN, linear.b_NR.detach(), xa_TS[:, ranks])
            parts.append(dxa_TR)
        d_bs.append(d_b)
    if not parts:
        return None
    return AdapterGradients(parts[0] if len(parts) == 1 else torch.cat(parts, 1), d_bs)


def linears_backward_input(
    dys: Sequence[Tensor],
    xa_TS: Tensor | None,
    linears: Sequence[Linear],
    *,
    needs_input: bool = True,
    quantized: Sequence[Quantized | None] | None = None,
) -> tuple[Tensor | None, AdapterGradients | None]:
    """(the gradient [T, K] of x, and what `linears_backward_parameters` needs of the adapters).

    `xa_TS`: None where there is no adapter, or not yet. `quantized`: each dy in FP8, where they were made.
    """
    adapters = _through_b(dys, xa_TS, linears)
    if not needs_input:
        return None, adapters
    matrices = _rounded(linears, dys[0].dtype)
    low_rank = dx_TK = None
    if adapters is not None and matrices is not None:
        if _drops_out(linears):
            dx_TK = _gradient_through_a(adapters.dxa_TS, linears, matrices.a_SK)
        else:
            low_rank = (adapters.dxa_TS, matrices.a_SK.t())
    weights = [linear.weight for linear in linears if isinstance(linear.weight, QuantizedWeight)]
    if len(weights) == len(linears):
        given = quantized or [None] * len(linears)
        products = [
            weight.transposed_product(quantized_if_needed(dy, linears, dy8))
            for dy, weight, dy8 in zip(dys, weights, given, strict=True)
        ]
        return fp8_sum(products, low_rank=low_rank, add_TN=dx_TK, dtype=dys[0].dtype), adapters
    dense_weights = [linear.weight.weight_NK for linear in linears if isinstance(linear.weight, DenseWeight)]
    if len(dense_weights) == len(linears):
        dense = [(dy_TN, weight_NK.detach()) for dy_TN, weight_NK in zip(dys, dense_weights, strict=True)]
        if sums_in_one_launch(dense, low_rank, dx_TK):
            return dense_sum(dense, low_rank=low_rank, add_TN=dx_TK), adapters
    if low_rank is not None:
        dxa_TS, a_KS = low_rank
        dx_TK = dxa_TS @ a_KS.t()
    for dy_TN, linear in zip(dys, linears, strict=True):
        dx_TK = linear.weight.transposed_times(dy_TN, dx_TK, quantized_if_needed(dy_TN, (linear,)))
    return dx_TK, adapters


def linears_backward_parameters(
    dys: Sequence[Tensor],
    x: Tensor | NormedRows,
    xa_TS: Tensor | None,
    adapters: AdapterGradients | None,
    linears: Sequence[Linear],
) -> list[Tensor | None]:
    """The gradients of `linear.tensors()`, linear by linear; None where nothing is trained."""
    if isinstance(x, NormedRows) and any(linear.weight.trained is not None for linear in linears):
        x = x.made()
    slices = _rank_slices(linears)
    da_SK: Tensor | None = None
    d_bs: list[Tensor | None] = [None] * len(linears)
    if adapters is not None and xa_TS is not None:
        d_bs = list(adapters.d_bs)
        missing = [i for i, linear in enumerate(linears) if linear.b_NR is not None and d_bs[i] is None]
        of_b = [(xa_TS[:, slices[i]], dys[i]) for i in missing]
        da_SK, *made = _gradients_of_a_and_b(adapters.dxa_TS, x, linears, of_b)
        for i, gradient in zip(missing, made, strict=True):
            d_bs[i] = gradient
    gradients: list[Tensor | None] = []
    for dy_TN, d_b, linear, ranks in zip(dys, d_bs, linears, slices, strict=True):
        d_weight = d_bias = d_a = None
        if (weight := linear.weight.trained) is not None:
            # In the weight's dtype: a bf16 weight has a bf16 gradient, as without fusing.
            assert isinstance(x, Tensor)
            d_weight = dy_TN.t() @ x if weight.dtype == x.dtype else matmul_fp32(dy_TN.t(), x)
        if linear.bias_N is not None and linear.bias_N.requires_grad:
            d_bias = dy_TN.sum(0, dtype=torch.float32 if dy_TN.dtype != torch.float64 else None)
        if linear.a_RK is not None and xa_TS is not None and da_SK is not None:
            d_a = da_SK[ranks] if linear.scaling == 1.0 else da_SK[ranks] * linear.scaling
        gradients += [d_weight, d_bias, d_a, d_b]
    return gradients


# ----------------------------------------------------------------------------------------------------------------------
# Reference


def linears_reference(x_TK: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """The results of `linears_forward` in plain PyTorch and the dtype of x, with gradients by autograd. Weights are
    what NF4 and FP8 hold; x is not quantized."""
    results = []
    for linear in linears:
        y_TN = F.linear(x_TK, _dense(linear.weight, x_TK.dtype), linear.bias_N)
        if linear.a_RK is not None and linear.b_NR is not None:
            a_RK, b_NR = linear.a_RK.to(x_TK.dtype), linear.b_NR.to(x_TK.dtype)
            kept_TK = seeded_dropout(torch.ones_like(x_TK), linear.dropout, linear.seed) if linear.dropout else 1.0
            y_TN = y_TN + ((x_TK * kept_TK) @ a_RK.t()) @ b_NR.t() * linear.scaling
        results.append(y_TN)
    return results


def _dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, QuantizedWeight):
        return weight.weight.dequantize(dtype)
    dense = weight.prepared(dtype)
    assert isinstance(dense, DenseWeight)
    return dense.weight_NK.to(dtype)
