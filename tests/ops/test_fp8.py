"""FP8 rows and products: no error beyond that of rounding each row to E4M3 once."""

import pytest
import torch

from truetune.ops import backend
from truetune.ops.fp8 import (
    Fp8Weight,
    frozen_fp8_linear,
    frozen_fp8_linear_reference,
    quantize_rows,
    quantize_rows_reference,
    scaled_product,
    why_not_fp8,
    why_not_fp8_shape,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _needs_fp8(request):
    on_gpu = "device" in request.fixturenames and request.getfixturevalue("device") == "cuda"
    if on_gpu and (reason := why_not_fp8("cuda")):
        pytest.skip(reason)


def randn(device, dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def dequantize(x8, scale):
    return x8.double() * scale.double()[:, None]


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5000), (5, 133), (1, 1), (0, 16)], ids=str)
def test_rows_are_scaled_to_448_and_rounded_to_the_nearest(device, dtype, shape, empty_is_nan):
    x = randn(device, dtype, *shape)
    x8, scale = quantize_rows(x)
    expected8, expected_scale = quantize_rows_reference(x)
    assert x8.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert torch.equal(scale, expected_scale)
    assert torch.equal(x8.view(torch.uint8), expected8.view(torch.uint8))
    if len(x):
        assert (x8.float().abs().amax(-1) == 448).all()
    # Half a unit in the last of E4M3's 3 binary places; below its smallest normal number, half of that number's unit.
    half_unit = torch.maximum(x.double().abs() * 2**-4, scale.double()[:, None] * 2**-10)
    assert ((dequantize(x8, scale) - x.double()).abs() <= half_unit * (1 + 1e-6)).all()


def test_rows_may_be_strided_and_columns_become_rows(device):
    x = randn(device, torch.bfloat16, 6, 320)
    for ours, expected in zip(quantize_rows(x[::2, 32:208]), quantize_rows(x[::2, 32:208].contiguous()), strict=True):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))
    x8, scale = quantize_rows(x, transpose=True)
    assert x8.shape == (320, 6) and x8.is_contiguous()
    for ours, expected in zip((x8, scale), quantize_rows(x.t().contiguous()), strict=True):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


def test_scales_of_powers_of_two_are_the_next_ones_above(device):
    x = randn(device, torch.bfloat16, 40, 133)
    x[0], x[1] = 0, 448 * 2.0**-3  # whose scale is one already
    x8, scale = quantize_rows(x, powers_of_two=True)
    expected8, expected_scale = quantize_rows_reference(x, powers_of_two=True)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(x8.view(torch.uint8), expected8.view(torch.uint8))
    assert (scale.frexp()[0] == 0.5).all() and scale[1] == 2.0**-3
    largest = x8.float().abs().amax(-1)[1:]
    assert largest[0] == 448 and ((largest >= 224) & (largest <= 448)).all()
    assert torch.equal(dequantize(x8, scale), dequantize(x8, scale).bfloat16().double())


def test_both_layouts_of_a_weight_are_the_same_matrix(device):
    """Else the backward pass would go through another function than the forward pass computed, in every step alike."""
    weight = randn(device, torch.bfloat16, 48, 320) * torch.logspace(-2, 2, 320, device=device).bfloat16()
    held = Fp8Weight.quantize(weight)
    rows, columns = held.dequantize(torch.float32), (held.weight8_KN.float() * held.scale_1K.t()).t()
    normal = weight.abs() >= 2**-6 * torch.maximum(held.scale_1N.t(), held.scale_1K)  # E4M3's smallest such number
    assert normal.float().mean() > 0.9 and torch.equal(rows[normal], columns[normal])
    assert (rows - columns).abs().max() <= 2**-9 * torch.maximum(held.scale_1N.max(), held.scale_1K.max())


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_zeros_outliers_and_denormals_keep_their_row_finite(device, powers_of_two):
    x = randn(device, torch.float32, 5, 2100)
    x[0] = 0
    x[1, 7] = 3e38
    x[2] *= 1e-40  # denormal in fp32
    x[3] *= 1e-30
    x8, scale = quantize_rows(x, powers_of_two=powers_of_two)
    back = x8.float() * scale[:, None]
    assert back.isfinite().all() and scale.isfinite().all() and (scale > 0).all()
    assert (back[0] == 0).all()
    assert x8[1, 7].float() == 448 or (powers_of_two and 224 <= x8[1, 7].float() < 448)
    assert back[1, 7].item() == pytest.approx(3e38, rel=2**-4 if powers_of_two else 1e-6)
    assert (back[1].abs() > 0).sum() == 1
    assert (back[2].abs() <= 1e-37).all()
    assert error(back[3], x[3].double()) < 2**-5


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_what_is_nan_or_infinite_becomes_nan_and_spoils_no_other_row(device, powers_of_two):
    x = randn(device, torch.bfloat16, 4, 2100)
    clean8, clean_scale = quantize_rows(x, powers_of_two=powers_of_two)
    x[1, 5], x[2, 6] = float("nan"), float("-inf")
    x8, scale = quantize_rows(x, powers_of_two=powers_of_two)
    back = x8.float() * scale[:, None]
    assert back[1, 5].isnan() and back[2, 6].isnan()
    for row in (0, 3):
        assert torch.equal(x8[row].view(torch.uint8), clean8[row].view(torch.uint8)) and scale[row] == clean_scale[row]


# -- products ----------------------------------------------------------------------------------------------------------


def measured_baseline(x, weight):
    """Of y = x @ weight.T in fp64: exact, and with both sides rounded to rows of E4M3, as plain PyTorch rounds them."""
    exact = x.double() @ weight.double().t()
    weight8, scale = quantize_rows_reference(weight, powers_of_two=True)
    return exact, dequantize(*quantize_rows_reference(x)) @ dequantize(weight8, scale).t()


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_rounding_to_e4m3_and_at_most_1_05_times_it(device, dtype, outliers):
    num_tokens, in_features, out_features = (9, 256, 176) if backend.FORCE_KERNELS else (131, 256, 176)
    x = randn(device, dtype, num_tokens, in_features)
    weight = (randn(device, dtype, out_features, in_features, seed=1) / 16).to(dtype)
    dy = randn(device, dtype, num_tokens, out_features, seed=2)
    if outliers:  # as in activations: a few features are large in every row
        x[:, ::50] *= 30
        weight[3] *= 100
    x.requires_grad_()
    y = frozen_fp8_linear(x, Fp8Weight.quantize(weight))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == dtype
    for value, (exact, rounded) in (
        (y, measured_baseline(x.detach(), weight)),
        (dx, measured_baseline(dy, weight.t().contiguous())),
    ):
        assert error(rounded, exact) < 2**-4
        assert error(value, exact) <= 1.05 * error(rounded, exact)
        assert error(value, rounded) < (1e-5 if dtype == torch.float32 and device == "cpu" else 2**-8)


def test_the_primitives_are_the_two_halves_of_the_public_function(device):
    x, weight = randn(device, torch.bfloat16, 5, 64), randn(device, torch.bfloat16, 48, 64, seed=1)
    bias, dy = randn(device, torch.bfloat16, 48, seed=2), randn(device, torch.bfloat16, 5, 48, seed=3)
    held = Fp8Weight.quantize(weight)
    leaf, leaf_bias = x.clone().requires_grad_(), bias.clone().requires_grad_()
    y = frozen_fp8_linear(leaf[None], held, leaf_bias)
    assert y.shape == (1, 5, 48)
    dx, dbias = torch.autograd.grad(y, (leaf, leaf_bias), dy[None])
    assert torch.equal(y[0], scaled_product(held.times(*quantize_rows(x)), bias=bias))
    assert torch.equal(dx, scaled_product(held.transposed_times(*quantize_rows(dy))))
    torch.testing.assert_close(dbias, dy.float().sum(0).bfloat16())
    torch.testing.assert_close(y[0], frozen_fp8_linear_reference(x, weight, bias), rtol=2**-7, atol=1e-2)
    expected = (held.weight8_NK.float() * held.scale_1N.t()).bfloat16()
    assert torch.equal(held.dequantize(), expected)
    assert error(held.dequantize(), weight.double()) < 2**-4


def test_an_expanded_gradient_and_an_odd_layout_of_x_are_read_right(device):
    weight = randn(device, torch.float32, 32, 16)
    held = Fp8Weight.quantize(weight)
    x = randn(device, torch.float32, 16, 6).t().requires_grad_()
    y = frozen_fp8_linear(x, held)
    y.sum().backward()
    plain = x.detach().contiguous().requires_grad_()
    expected = frozen_fp8_linear(plain, held)
    expected.backward(torch.ones_like(expected))
    assert torch.equal(y, expected) and torch.equal(x.grad, plain.grad)
    assert error(x.grad, weight.double().sum(0).expand(6, 16)) < 2**-4


def test_no_tokens_are_no_error(device):
    held = Fp8Weight.quantize(randn(device, torch.bfloat16, 32, 16))
    x = torch.zeros(0, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = frozen_fp8_linear(x, held)
    y.sum().backward()
    assert y.shape == (0, 32) and x.grad.shape == (0, 16)


# -- where it works ----------------------------------------------------------------------------------------------------


def test_a_device_or_shape_without_fp8_gets_one_sentence(monkeypatch):
    assert why_not_fp8("cpu") is None
    assert why_not_fp8("mps") == "FP8 weights need an NVIDIA GPU, and this is a mps device: use bf16."
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, works in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        reason = why_not_fp8("cuda")
        assert (reason is None) == works
        if reason:
            assert f"NVIDIA A100 has {capability[0]}.{capability[1]}: use bf16 or nf4." in reason
    assert why_not_fp8_shape(4096, 1024) is None
    assert "multiples of 16, and this one is 1024 x 4100" in why_not_fp8_shape(4100, 1024)


def test_scales_and_their_inverses_are_normal_numbers_of_fp32(device):
    x = torch.tensor(
        [[0.0], [1e-44], [torch.finfo(torch.float32).tiny], [torch.finfo(torch.float32).max]], device=device
    )
    _, scale = quantize_rows(x)
    for number in (scale, scale.reciprocal()):
        assert (number >= torch.finfo(torch.float32).tiny).all() and number.isfinite().all()
