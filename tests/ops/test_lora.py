"""Linears with LoRA against PyTorch's own autograd in fp64, and 4-bit weights against bitsandbytes."""

from dataclasses import replace

import pytest
import torch

from truetune.ops import backend
from truetune.ops.dropout import seeded_dropout
from truetune.ops.fp8 import Fp8Weight, quantize_rows, why_not_fp8
from truetune.ops.lora import (
    DenseWeight,
    Linear,
    Nf4Weight,
    QuantizedWeight,
    draw_seeds,
    linears_backward_input,
    linears_backward_parameters,
    linears_forward,
    linears_reference,
)
from truetune.ops.nf4 import dequantize_nf4, dequantize_nf4_reference

T, K = 37, 48
WIDTHS, RANKS, SCALINGS = (72, 24, 40), (4, 5, 0), (2.0, 0.75, 1.0)  # the third has no adapter


def make(device, dtype, adapter_dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(device, dtype).requires_grad_()

    linears = []
    for n, r, scaling in zip(WIDTHS, RANKS, SCALINGS, strict=True):
        a, b = (draw(r, K, dtype=adapter_dtype), draw(n, r, dtype=adapter_dtype)) if r else (None, None)
        linears.append(Linear(DenseWeight(draw(n, K, scale=K**-0.5)), draw(n), a, b, scaling))
    x = draw(T, K)
    dys = [draw(T, n).detach() for n in WIDTHS]
    return x, linears, dys


def plain(x, linears, dys, dtype):
    """Results and gradients by autograd, everything in `dtype`."""
    x = x.detach().to(dtype).requires_grad_()
    wanted, copies = [x], []
    for linear in linears:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in linear.tensors()]
        weight, bias, a, b = leaves
        copies.append(replace(linear, weight=DenseWeight(weight), bias_N=bias, a_RK=a, b_NR=b))
        wanted += [t for t in leaves if t is not None]
    results = linears_reference(x, copies)
    gradients = torch.autograd.grad(results, wanted, [dy.to(dtype) for dy in dys])
    return [*(r.detach() for r in results), *gradients]


def ours(x, linears, dys):
    with torch.no_grad():
        results, xa = linears_forward(x, linears)
        dx, adapters = linears_backward_input(dys, xa, linears)
        gradients = linears_backward_parameters(dys, x, xa, adapters, linears)
    return [*results, dx, *(g for g in gradients if g is not None)]


def error(value, exact):
    return ((value.double().cpu() - exact.cpu()).norm() / exact.cpu().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_1_5_times_that_of_plain_pytorch(device, dtype):
    inputs = make(device, dtype)
    exact = plain(*inputs, torch.float64)
    for mine, theirs, true in zip(ours(*inputs), plain(*inputs, dtype), exact, strict=True):
        assert error(mine, true) <= max(1.5 * error(theirs, true), 3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_drops_out_in_the_forward_pass_has_no_gradient(device, dtype):
    x, linears, dys = make(device, dtype)
    linears[0].dropout, linears[1].dropout = 0.5, 0.1
    draw_seeds(linears)
    assert linears[0].seed != linears[1].seed and linears[2].seed == 0
    theirs = plain(x, linears, dys, dtype)  # not in fp64, for which the kernels' mask is not made
    for mine, his in zip(ours(x, linears, dys), theirs, strict=True):
        assert error(mine, his.double()) <= (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("fp8", [(True, True, True), (True, False, True)], ids=["all FP8", "mixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_fp8_weights_beside_adapters_give_the_sums_of_fp64(device, fp8, dropout):
    """Of what the rows of x, dy and the weights are in E4M3."""
    if device == "cuda" and (reason := why_not_fp8("cuda")):
        pytest.skip(reason)
    x, dys = randn(device, T, 64), [randn(device, T, n, seed=n) for n in (48, 32, 80)]
    linears = []
    for i, (n, rank) in enumerate(zip((48, 32, 80), (8, 0, 16), strict=True)):
        weight = (randn(device, n, 64, seed=i) / 8).bfloat16()
        a, b = (randn(device, rank, 64, seed=20 + i) / 8, randn(device, n, rank, seed=30 + i)) if rank else (None, None)
        held = QuantizedWeight(Fp8Weight.quantize(weight)) if fp8[i] else DenseWeight(weight)
        linears.append(Linear(held, None, a, b, 1.5, dropout if rank else 0.0, seed=7 + i))
    with torch.no_grad():
        ys, xa = linears_forward(x, linears)
        dx, _ = linears_backward_input(dys, xa, linears)

    def of(rows, quantized):
        rows8, scale = quantize_rows(rows)
        return rows8.double() * scale.double()[:, None] if quantized else rows.double()

    exact_dx = torch.zeros_like(x, dtype=torch.float64)
    for y, dy, linear, quantized in zip(ys, dys, linears, fp8, strict=True):
        weight = linear.weight.weight if quantized else linear.weight.weight_NK
        forward = weight.dequantize(torch.float64) if quantized else weight.double()
        backward = (weight.weight8_KN.double() * weight.scale_1K.double().t()).t() if quantized else weight.double()
        exact = of(x, quantized) @ forward.t()
        exact_dx += of(dy, quantized) @ backward
        if linear.a_RK is not None:
            mask = 1.0
            if dropout:
                mask = seeded_dropout(torch.ones_like(x, dtype=torch.float32), dropout, linear.seed).double()
            a, b = linear.a_RK.double() * 1.5, linear.b_NR.double()
            exact += (x.double() * mask) @ a.t() @ b.t()
            exact_dx += (dy.double() @ b @ a) * mask
        assert error(y, exact) < 0.01
    assert error(dx, exact_dx) < 0.01


def randn(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


def test_a_part_of_the_rows_drops_out_as_in_the_whole(device):
    x = torch.randn(50, 300, device=device)
    whole = seeded_dropout(x, 0.3, 2**40 + 5)
    assert torch.equal(whole, seeded_dropout(x, 0.3, 2**40 + 5))
    assert not torch.equal(whole == 0, seeded_dropout(x, 0.3, 2**40 + 99) == 0)
    assert (whole == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.allclose(whole[whole != 0], x[whole != 0] / 0.7)
    assert torch.allclose(seeded_dropout(x, 0.3, 2**40 + 5, add_TK=x), whole + x)
    if backend.use_kernels(x):  # plain PyTorch recomputes all rows at once
        assert torch.equal(seeded_dropout(x[20:], 0.3, 2**40 + 25), whole[20:])


def test_gradients_have_the_dtype_of_what_is_trained(device):
    x, linears, dys = make(device, torch.bfloat16)
    _, xa = linears_forward(x.detach(), linears)
    _, adapters = linears_backward_input(dys, xa, linears)
    gradients = linears_backward_parameters(dys, x.detach(), xa, adapters, linears)
    dtypes = {g.dtype for g in gradients[2:4]}
    assert gradients[0].dtype == torch.bfloat16  # a weight's
    assert dtypes == {torch.float32}  # an adapter's, summed over tokens in fp32


def test_results_are_added_to_what_is_given(device):
    x, linears, _ = make(device, torch.bfloat16)
    for linear in linears:
        residual = torch.randn(T, linear.weight.out_features, device=device, dtype=torch.bfloat16)
        before = residual.clone()
        with torch.no_grad():
            (alone,), _ = linears_forward(x, (linear,))
            (added,), _ = linears_forward(x, (linear,), residual_TN=residual)
        exact = alone.float() + residual.float()
        assert (added.float() - exact).abs().max() <= 0.02 * exact.abs().max()
        assert torch.equal(residual, before)


def test_an_adapter_smaller_than_the_rounding_of_the_residual_stream_acts_on_average(device):
    """In its first steps it always is; what is lost in every element is lost for the loss."""
    torch.manual_seed(0)
    x, weight, residual = (torch.randn(shape, device=device) for shape in ((512, 64), (256, 64), (512, 256)))
    a, b = torch.randn(4, 64, device=device), torch.full((256, 4), 2e-4, device=device)
    x, weight, residual = x.bfloat16(), (weight / 8).bfloat16(), (8 * residual).bfloat16()
    results = []
    for b_NR in (b, torch.zeros_like(b)):
        linear = Linear(DenseWeight(weight), None, a, b_NR)
        results.append(linears_forward(x, [linear], residual_TN=residual)[0][0].double())
    added = (x.float() @ a.t() @ b.t()).double()
    assert added.abs().max() < 2**-6  # half a place of what lies between 4 and 8
    survived = ((results[0] - results[1]) * added).sum() / added.square().sum()
    assert survived.item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("nested", [True, False], ids=["double quantization", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_4_bit_weights_are_those_of_bitsandbytes(device, dtype, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(192, 320, device=device, dtype=dtype)
    packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    theirs = dequantize_nf4_reference(packed, state, dtype)
    mine = dequantize_nf4(packed, state, dtype)
    assert mine.shape == weight.shape and mine.dtype == dtype
    assert (mine.float() - theirs.float()).abs().max() <= torch.finfo(dtype).eps * theirs.abs().max()
    x = torch.randn(5, 320, device=device, dtype=dtype)
    product = Nf4Weight(packed, state).times(x)
    assert torch.allclose(product.float(), (x @ mine.t()).float(), rtol=1e-5, atol=1e-5)
