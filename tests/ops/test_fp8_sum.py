"""Sums of FP8 products: nothing is lost beside what E4M3 lost, whichever scales meet."""

import pytest
import torch

from truetune.ops import backend
from truetune.ops import fp8_sum as module
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


def exact_parts(products, low_rank=None, add=None):
    parts = [
        (a8.double() * scale.double()[:, None]) @ (b8.double().t() * b_scale.double())
        for a8, scale, b8, b_scale in products
    ]
    if low_rank is not None:
        x, b = low_rank
        parts.append(x.double() @ b.to(x.dtype).double().t())
    return torch.stack(parts if add is None else [*parts, add.double()])


def exact_sum(*args):
    return exact_parts(*args).sum(0)


def assert_rounded(value, parts, device, once=True):
    """Their sum, to bf16; or each of them, and their sums. The tensor cores of a GPU keep sums in 14 bits."""
    exact, size = parts.sum(0), parts.abs().sum(0)
    allowed = exact.abs() * 2**-8 + size * (1e-5 if once else 2**-7) + 1e-6 * size.mean()
    if device == "cuda":
        allowed += size.mean() * 2**-7
    assert value.dtype == torch.bfloat16
    assert ((value.double() - exact).abs() <= allowed).all()


@pytest.fixture
def in_one_kernel(monkeypatch):
    """How many sums the kernel has made; and whether it should make those of this device."""
    made, launch = [], module._launch
    monkeypatch.setattr(module, "_launch", lambda *args: made.append(1) or launch(*args))
    return made


def has_kernel(device):
    return backend.FORCE_KERNELS or (device == "cuda" and torch.cuda.get_device_capability() == (9, 0))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rank", [None, 8, 48, 100, 200])
@pytest.mark.parametrize("add", [False, True])
def test_sum_is_that_of_fp64_rounded_once(device, widths, rank, add, in_one_kernel, empty_is_nan):
    products, low_rank = products_of(device, widths), None
    if rank is not None:
        low_rank = randn(device, T, rank, seed=20), randn(device, N, rank, seed=21).float() * 0.1
    addend = randn(device, T, N, seed=22) if add else None
    before = None if addend is None else addend.clone()
    out = fp8_sum(products, low_rank=low_rank, add_TN=addend)
    one = has_kernel(device) and rank != 100  # which is no multiple of 8
    assert len(in_one_kernel) == one
    assert_rounded(out, exact_parts(products, low_rank, addend), device, once=one)
    assert addend is None or torch.equal(addend, before)


def slices(device):
    """x, b and addends as callers might have them; the kernel cannot load all of them."""
    wide, b = randn(device, T, 60, seed=20), randn(device, N, 40, seed=21)
    flat = randn(device, N * 16 + 3, seed=23)
    stream = randn(device, T, 2 * N, seed=22)
    yield "slice at 16 bytes", (wide[:, :48].contiguous()[:, 16:32], b[:, :16]), None
    yield "slice between", (randn(device, T, 48, seed=20)[:, 3:19], b[:, :16]), None
    yield "rows of 40 bytes", (randn(device, T, 20, seed=20)[:, 8:16], b[:, :8]), None
    yield "strided b", (wide[:, :16].contiguous(), b[:, 5:21]), None
    yield "transposed b", (wide[:, :16].contiguous(), randn(device, 16, N, seed=21).t()), None
    yield "transposed b in a flat buffer", (wide[:, :16].contiguous(), flat[3:].view(16, N).t()), None
    yield "stepped b", (wide[:, :16].contiguous(), b[:, ::2][:, :16]), None
    yield "slice of a stream", None, stream[:, :N]
    yield "slice between of a stream", None, stream[:, 3 : N + 3]
    yield "the same row", None, stream[:1, :N].expand(T, N)


def test_operands_may_be_slices(device):
    products = products_of(device, (96,))
    for what, low_rank, addend in slices(device):
        out = fp8_sum(products, low_rank=low_rank, add_TN=addend)
        exact = exact_sum(products, low_rank, addend)
        assert ((out.double() - exact).norm() / exact.norm()).item() < 2**-7, what


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
    assert_rounded(out, exact_parts(products), device, once=has_kernel(device))


def test_first_rows_of_zeros_do_not_hide_the_next(device):
    products = products_of(device, (64, 32))
    a8, scale, b8, b_scale = products[0]
    a8[3], scale[3] = 0, 2.0**-125
    b8[5], b_scale[0, 5] = 0, 2.0**-125
    assert_rounded(fp8_sum(products), exact_parts(products), device, once=has_kernel(device))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_scales_that_make_up_for_each_other(device, order):
    """A gradient's row far smaller than the next product's, and the weight's column as much larger."""
    products = [products_of(device, (64, 32, 48))[i] for i in order]
    exponents = torch.arange(-18, 19, 6, device=device)
    for i, product in enumerate(products):
        _, scale, _, b_scale = product
        scale *= 2.0 ** exponents[(torch.arange(T, device=device) + i) % 7] * 10.0 ** order[i]
        b_scale *= 2.0 ** exponents[(torch.arange(N, device=device) * (i + 1) + 3) % 7]
    assert_rounded(fp8_sum(products), exact_parts(products), device, once=has_kernel(device))


def test_first_product_of_zero_does_not_enlarge_the_next(device):
    products = products_of(device, (64, 32))
    products[0].a8_TK[:, ::2], products[0].b8_NK[:, 1::2] = 0, 0  # rows are not 0, their product is
    products[1].scale_T.mul_(2.0**-24)
    assert_rounded(fp8_sum(products), exact_parts(products), device, once=has_kernel(device))


def test_what_is_not_a_number_is_seen(device):
    for value, which in ((float("nan"), 0), (float("nan"), 1), (float("inf"), 2)):
        products = products_of(device, (64, 32, 48))
        row = randn(device, 1, products[which].a8_TK.shape[1])
        row[0, 7] = value
        products[which].a8_TK[4:5], products[which].scale_T[4:5] = quantize_rows(row)
        out = fp8_sum(products)
        assert out[4].isnan().all() and out[:4].isfinite().all() and out[5:].isfinite().all()


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
