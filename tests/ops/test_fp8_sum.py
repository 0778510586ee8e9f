"""Sums of FP8 products: nothing is lost beside what E4M3 lost, whichever scales meet."""

import pytest
import torch

from truetune.ops.fp8 import Fp8Product, quantize_rows, why_not_fp8
from truetune.ops.fp8_sum import fp8_sum

T, N = 70, 272
WIDTHS = [(96,), (160, 64), (64, 32, 48)]


@pytest.fixture(autouse=True)
def _needs_fp8(device):
    if device == "cuda" and (reason := why_not_fp8("cuda")):
        pytest.skip(reason)


def randn(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def products_of(device, widths, rows=T):
    products = []
    for i, K in enumerate(widths):
        a8_TK, scale_T = quantize_rows(randn(device, rows, K, seed=i) * 10.0**-i)
        b8_NK, scale_N = quantize_rows(randn(device, N, K, seed=10 + i) * K**-0.5)
        products.append(Fp8Product(a8_TK, scale_T, b8_NK, scale_N[None, :]))
    return products


def exact_sum(products, low_rank=None, add=None):
    total = torch.zeros((), dtype=torch.float64)
    for a8, scale, b8, b_scale in products:
        total = total.to(a8.device) + (a8.double() * scale.double()[:, None]) @ (b8.double().t() * b_scale.double())
    if low_rank is not None:
        total = total + low_rank[0].double() @ low_rank[1].to(low_rank[0].dtype).double().t()
    return total if add is None else total + add.double()


def assert_rounded_once(value, exact, device, sums=1):
    """To bf16. The tensor cores of a GPU keep sums in 14 bits, which costs as much as bf16 again."""
    units = exact.abs() * 2**-8 + exact.abs().mean() * 2**-8
    allowed = units * (1 if device == "cpu" else 4) * sums
    assert value.dtype == torch.bfloat16
    assert ((value.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rank", [None, 8, 48, 100, 200])
@pytest.mark.parametrize("add", [False, True])
def test_sum_is_that_of_fp64(device, widths, rank, add, empty_is_nan):
    products = products_of(device, widths)
    low_rank = None
    if rank is not None:
        low_rank = randn(device, T, rank, seed=20), randn(device, N, rank, seed=21).float() * 0.1
    addend = randn(device, T, N, seed=22) if add and len(widths) < 3 else None
    before = None if addend is None else addend.clone()
    out = fp8_sum(products, low_rank=low_rank, add_TN=addend)
    assert_rounded_once(out, exact_sum(products, low_rank, addend), device, sums=len(widths) + 1)
    assert addend is None or torch.equal(addend, before)


def test_adapter_may_be_a_slice_and_transposed(device):
    products = products_of(device, (96,))
    x_TS, a_SN = randn(device, T, 48, seed=20), randn(device, 16, N, seed=21)
    low_rank = x_TS[:, 16:32], a_SN.t()
    assert_rounded_once(fp8_sum(products, low_rank=low_rank), exact_sum(products, low_rank), device, sums=2)
    low_rank = x_TS[:, 3:19], a_SN.t()  # not at a multiple of 16 bytes
    assert_rounded_once(fp8_sum(products, low_rank=low_rank), exact_sum(products, low_rank), device, sums=2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_rows_of_zeros_and_of_far_scales_leave_the_others_alone(device, order):
    products = [products_of(device, (64, 32, 48))[i] for i in order]
    a8, scale, b8, b_scale = products[1]
    a8[3], scale[3] = 0, 2.0**-125  # what `quantize_rows` makes of zeros
    b8[5], b_scale[0, 5] = 0, 2.0**-125
    scale[4] = 1e-30
    b_scale[0, 6] = 1e-30
    a8, scale, b8, b_scale = products[2]
    a8[3], scale[3] = 0, 2.0**-125
    b8[5], b_scale[0, 5] = 0, 2.0**-125
    out = fp8_sum(products)
    assert out.isfinite().all()
    assert_rounded_once(out, exact_sum(products), device, sums=3)


def test_first_rows_of_zeros_do_not_hide_the_next(device):
    products = products_of(device, (64, 32))
    a8, scale, b8, b_scale = products[0]
    a8[3], scale[3] = 0, 2.0**-125
    b8[5], b_scale[0, 5] = 0, 2.0**-125
    out, exact = fp8_sum(products), exact_sum(products)
    assert_rounded_once(out[3], exact[3], device, sums=2)
    assert_rounded_once(out[:, 5], exact[:, 5], device, sums=2)


def test_small_adapter_survives_in_the_residual_stream_on_average(device):
    """Smaller than half a bf16 place of most elements, it must still move the mean (see `ops/lora.py`)."""
    products = products_of(device, (96,), rows=512)
    stream = randn(device, 512, N, seed=22) * 8
    x, b = randn(device, 512, 16, seed=20), randn(device, N, 16, seed=21) * 3e-4
    moved = fp8_sum(products, low_rank=(x, b), add_TN=stream).double() - fp8_sum(products, add_TN=stream).double()
    adapter = x.double() @ b.double().t()
    assert (moved * adapter).sum() / adapter.square().sum() > 0.9  # more than 1 where it breaks ties


def test_no_rows_and_other_dtypes(device):
    products = products_of(device, (96,), rows=0)
    assert fp8_sum(products).shape == (0, N)
    products = products_of(device, (96, 64))
    stream = randn(device, T, N, seed=22).float()
    out = fp8_sum(products[:1], add_TN=stream)
    exact = exact_sum(products[:1], None, stream)
    assert out.dtype == torch.float32
    assert ((out.double() - exact).norm() / exact.norm()).item() < 2**-8
