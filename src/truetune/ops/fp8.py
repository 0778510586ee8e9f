"""Products with frozen FP8 weights: E4M3 on both sides, a scale for each row of either operand.

A row is scaled so that its largest magnitude becomes 448, the largest E4M3 number (Micikevicius et al., "FP8 Formats
for Deep Learning", 2022), or a weight's at most that, and rounded to the nearest. Forward multiplies rows of
activations with rows of the weight, backward rows of gradients with its columns; `torch._scaled_mm` wants either
contiguous along the summed dimension, so an `Fp8Weight` holds the weight twice, in two bytes an element, as many as
bf16. Its scales are powers of two, which change no rounding above E4M3's smallest normal number: either copy, with
scales of its own, is the same matrix, and the gradient is that of the function that the forward pass computes.

Letters of tensor shapes: T tokens, K input features, N output features.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from truetune.ops.backend import next_power_of_2, tl, triton, use_kernels

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of E4M3
_TO_LARGEST = 1.0 / _LARGEST  # a product: PyTorch divides by a number exactly on a CPU and by its inverse on a GPU
_SMALLEST_AMAX = 448.0 * 2.0**-125  # below it the scale, or its inverse, would leave fp32's normal numbers
# Of fp32. Added to a number's bits and then cleared, it rounds up to a power of two; of NaN it makes -0, whose inverse
# makes NaN of the row.
_MANTISSA = 0x007FFFFF

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    _TO_LARGEST_TL, _SMALLEST_AMAX_TL = tl.constexpr(_TO_LARGEST), tl.constexpr(_SMALLEST_AMAX)
    _MANTISSA_TL = tl.constexpr(_MANTISSA)

    @triton.jit
    def row_scale(amax):
        """A row's scale and its inverse. No clamp is needed after it: amax * inverse exceeds 448 by roundings of fp32
        at most, and everything below 464 rounds to 448. What was NaN or infinite becomes NaN."""
        scale = tl.maximum(amax, _SMALLEST_AMAX_TL) * _TO_LARGEST_TL
        return scale, tl.div_rn(1.0, scale)

    @triton.jit
    def _quantize_rows_kernel(
        x_ptr, x8_ptr, scale_ptr, stride, width, POWERS_OF_TWO: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program a row, two passes over it; the second finds it in the cache."""
        row = tl.program_id(0).to(tl.int64)
        amax = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * stride + cols, mask=cols < width, other=0.0).to(tl.float32)
            amax = tl.maximum(amax, tl.abs(x))
        scale, inverse = row_scale(tl.max(amax, 0))
        if POWERS_OF_TWO:
            scale = ((scale.to(tl.int32, bitcast=True) + _MANTISSA_TL) & ~_MANTISSA_TL).to(tl.float32, bitcast=True)
            inverse = tl.div_rn(1.0, scale)
        tl.store(scale_ptr + row, scale)
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * stride + cols, mask=cols < width, other=0.0).to(tl.float32)
            tl.store(x8_ptr + row * width + cols, (x * inverse).to(tl.float8e4nv), mask=cols < width)


# ----------------------------------------------------------------------------------------------------------------------
# Launcher


def _launch(x_TK: Tensor, x8_TK: Tensor, scale_T: Tensor, powers_of_two: bool) -> None:
    T, K = x_TK.shape
    block = min(4096, next_power_of_2(K))
    with torch.cuda.device_of(x_TK):
        _quantize_rows_kernel[(T,)](
            x_TK, x8_TK, scale_T, x_TK.stride(0), K,
            POWERS_OF_TWO=powers_of_two, BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Forward and backward


def why_not_fp8(device: torch.device | str) -> str | None:
    """Why this device cannot multiply in FP8, in one sentence, or None. A CPU can: it dequantizes and uses fp32."""
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"FP8 weights need an NVIDIA GPU, and this is a {device.type} device: use bf16."
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return (
            f"FP8 weights need compute capability 8.9 (Ada, Hopper or newer), and {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}: use bf16 or nf4."
        )
    return None


def why_not_fp8_shape(in_features: int, out_features: int) -> str | None:
    """Why a weight of this shape cannot be FP8, in one sentence, or None: the GEMMs load 16 bytes at a time."""
    if in_features % 16 or out_features % 16:
        return (
            f"FP8 weights need feature counts that are multiples of 16, and this one is {out_features} x {in_features}:"
            " leave the layer out."
        )
    return None


def quantize_rows(x_TK: Tensor, *, transpose: bool = False, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x_TK -> (x8_TK in E4M3, scale_T in fp32) with x ~ x8 * scale; with `transpose` x8_KT and scale_K, of x's columns.

    `powers_of_two`: scales rounded up to them; a row's largest magnitude becomes more than 224, up to 448.
    The last dimension of x is contiguous, its rows may be strided. Rows of zeros stay zeros. Not differentiable.
    """
    if transpose:
        x_TK = x_TK.t().contiguous()  # for weights, once: a kernel of its own would not pay
    if not use_kernels(x_TK):
        return quantize_rows_reference(x_TK, powers_of_two=powers_of_two)
    x8_TK = torch.empty(x_TK.shape, dtype=FP8, device=x_TK.device)
    scale_T = torch.empty(x_TK.shape[0], dtype=torch.float32, device=x_TK.device)
    if x_TK.shape[0]:
        _launch(x_TK, x8_TK, scale_T, powers_of_two)
    return x8_TK, scale_T


class Fp8Product(NamedTuple):
    """(a8 * scale) @ (b8 * scale).T, not yet made: rows of activations or gradients with rows of a weight's copy."""

    a8_TK: Tensor
    scale_T: Tensor
    b8_NK: Tensor
    scale_1N: Tensor


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A frozen weight_NK in E4M3 for y = x @ weight.T (rows and their scales) and for dx = dy @ weight (columns).

    Both hold the same numbers, but for what is smaller than 1/14,336 of its row's or its column's largest magnitude.
    """

    weight8_NK: Tensor
    scale_1N: Tensor
    weight8_KN: Tensor
    scale_1K: Tensor

    @classmethod
    def quantize(cls, weight_NK: Tensor) -> "Fp8Weight":
        weight8_NK, scale_N = quantize_rows(weight_NK, powers_of_two=True)
        weight8_KN, scale_K = quantize_rows(weight_NK, transpose=True, powers_of_two=True)
        return cls(weight8_NK, scale_N[None, :], weight8_KN, scale_K[None, :])

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """weight_NK as the forward product sees it; in bf16 and fp32 without another rounding."""
        return (self.weight8_NK.float() * self.scale_1N.t()).to(dtype)

    def times(self, x8_TK: Tensor, scale_T: Tensor) -> Fp8Product:
        """x @ weight.T of a quantized x (`quantize_rows`)."""
        return Fp8Product(x8_TK, scale_T, self.weight8_NK, self.scale_1N)

    def transposed_times(self, dy8_TN: Tensor, scale_T: Tensor) -> Fp8Product:
        """dy @ weight of a quantized dy."""
        return Fp8Product(dy8_TN, scale_T, self.weight8_KN, self.scale_1K)


def scaled_product(
    product: Fp8Product, *, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a @ b.T + bias [T, N]. On a GPU the product is rounded to bf16, the one type `_scaled_mm` has for scales of rows.

    With `use_fast_accum`, where Hopper's tensor cores keep sums in about 14 bits and truncate them: an error of 0.2 to
    0.4% of the product instead of 0.17 (bf16's own), beside the 3.6% that rounding to FP8 makes of it, and 5 to 15% of
    the time. Measured in benchmarks/bench_fp8.py.
    """
    a8_TK, scale_T, b8_NK, scale_1N = product
    if not a8_TK.is_cuda:
        y_TN = (a8_TK.float() @ b8_NK.float().t()) * scale_T[:, None] * scale_1N
        return (y_TN if bias is None else y_TN + bias).to(out_dtype)
    if not a8_TK.shape[0]:
        return torch.empty((0, b8_NK.shape[0]), dtype=out_dtype, device=a8_TK.device)
    y_TN = torch._scaled_mm(
        a8_TK,
        b8_NK.t(),
        scale_a=scale_T[:, None],
        scale_b=scale_1N,
        bias=None if bias is None else bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y_TN.to(out_dtype)


class _FrozenFp8Linear(torch.autograd.Function):
    """Saves no activation: the gradient needs the weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Fp8Weight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.bias_dtype = weight, None if bias is None else bias.dtype
        x8_TK, scale_T = quantize_rows(x.reshape(-1, x.shape[-1]).contiguous())
        y_TN = scaled_product(weight.times(x8_TK, scale_T), bias=bias, out_dtype=x.dtype)
        return y_TN.view(*x.shape[:-1], y_TN.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, Tensor | None]:
        (dy,) = grads
        dy_TN = dy.reshape(-1, dy.shape[-1]).contiguous()  # it may be expanded from a scalar
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx_TK = scaled_product(ctx.weight.transposed_times(*quantize_rows(dy_TN)), out_dtype=dy.dtype)
            dx = dx_TK.view(*dy.shape[:-1], dx_TK.shape[1])
        if ctx.needs_input_grad[2]:
            dbias = dy_TN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, None, dbias


# ----------------------------------------------------------------------------------------------------------------------
# Public function


def frozen_fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype, x [..., K] quantized on the way; so is the gradient on its way back.

    Differentiable in x and bias. `why_not_fp8` and `why_not_fp8_shape` say where it cannot be used.
    """
    return _FrozenFp8Linear.apply(x, weight, bias)


# ----------------------------------------------------------------------------------------------------------------------
# Plain PyTorch


def quantize_rows_reference(x_TK: Tensor, *, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain PyTorch."""
    x_TK = x_TK.float()
    scale_T1 = x_TK.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_AMAX) * _TO_LARGEST
    if powers_of_two:
        scale_T1 = ((scale_T1.view(torch.int32) + _MANTISSA) & ~_MANTISSA).view(torch.float32)
    return (x_TK * scale_T1.reciprocal()).to(FP8), scale_T1.squeeze(-1)


def frozen_fp8_linear_reference(x: Tensor, weight_NK: Tensor, bias: Tensor | None = None) -> Tensor:
    """`frozen_fp8_linear` without autograd, the weight not yet quantized."""
    x8, scale_x = quantize_rows_reference(x.reshape(-1, x.shape[-1]))
    weight8, scale_w = quantize_rows_reference(weight_NK, powers_of_two=True)
    y_TN = (x8.float() * scale_x[:, None]) @ (weight8.float() * scale_w[:, None]).t()
    y_TN = y_TN if bias is None else y_TN + bias
    return y_TN.to(x.dtype).view(*x.shape[:-1], -1)
