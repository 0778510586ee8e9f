"""Products with a small rank: sums in fp32, whatever the strides."""

import pytest
import torch

from truetune.ops import low_rank
from truetune.ops.backend import use_kernels
from truetune.ops.low_rank import NormedRows, low_rank_backward, low_rank_product, outer, outers, project
from truetune.ops.rms_norm import rms_norm_forward


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_low_rank_product_writes_every_place_of_strided_tensors(device, rank):
    x = torch.randn(70, 3 * rank, device=device)[:, rank : 2 * rank]
    b = torch.randn(rank, 200, device=device).t()
    add = torch.randn(70, 200, device=device)
    out = torch.full((70, 400), float("nan"), device=device)[:, 100:300]
    exact = x.double() @ b.double().t()
    assert error(low_rank_product(x, b, (), out), exact) < 1e-6
    for adds in (3, 5):
        assert error(low_rank_product(x, b, [add] * adds, out.fill_(float("nan"))), exact + adds * add) < 1e-6


@pytest.fixture
def in_one_pass(monkeypatch):
    """How many gradients were read once, by programs for as many rows as on a small GPU."""
    passes, pays = [], low_rank._one_pass_pays
    monkeypatch.setattr(low_rank, "num_multiprocessors", lambda _: 7)
    monkeypatch.setattr(low_rank, "_one_pass_pays", lambda *tensors: passes.append(pays(*tensors)) or passes[-1])
    return passes


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 40])
@pytest.mark.parametrize("rows", [1, 33, 300])
def test_gradients_of_a_low_rank_product_are_those_of_fp64(device, rank, rows, in_one_pass, empty_is_nan):
    N = 2100 if device == "cuda" else 600  # on a GPU narrow ones have no kernel
    dy = torch.randn(rows, N + 300, device=device).bfloat16()[:, 100 : N + 100]
    x = torch.randn(rows, 3 * rank, device=device).bfloat16()[:, rank : 2 * rank]
    b = torch.randn(N, rank, device=device)
    dx, db = low_rank_backward(dy, b, x)
    assert in_one_pass == [rank <= 32 and use_kernels(dy)]
    assert dx.shape == x.shape and dx.dtype == dy.dtype
    exact = dy.double() @ b.bfloat16().double()
    assert error(dx, exact) < 2**-8
    if in_one_pass[0]:  # cuBLAS may add parts of a sum in bf16
        assert db.shape == b.shape and db.dtype == torch.float32
        assert ((dx.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
    else:
        assert db is None
        db = outer(x, dy, by_rank=False)
    assert error(db, dy.double().t() @ x.double()) < 1e-5


@pytest.mark.parametrize("which", range(3), ids=["dy", "b", "x"])
def test_one_of_them_may_be_transposed(device, which):
    tensors = [torch.randn(shape, device=device).bfloat16() for shape in ((64, 2100), (2100, 8), (64, 8))]
    tensors[which] = tensors[which].t().contiguous().t()
    dy, b, x = tensors
    dx, db = low_rank_backward(dy, b, x)
    assert db is None
    assert error(dx, dy.double() @ b.double()) < 2**-8
    assert error(outer(x, dy, by_rank=False), dy.double().t() @ x.double()) < 1e-4


def test_a_gradient_is_the_same_twice_to_the_bit(device):
    dy, x = torch.randn(300, 4096, device=device).bfloat16(), torch.randn(300, 16, device=device).bfloat16()
    b = torch.randn(4096, 16, device=device)
    for first, second in zip(low_rank_backward(dy, b, x), low_rank_backward(dy, b, x), strict=True):
        assert first is second is None or torch.equal(first, second)


def test_no_rows_have_no_gradient(device):
    dy, x = torch.ones(0, 64, device=device).bfloat16(), torch.ones(0, 8, device=device).bfloat16()
    dx, db = low_rank_backward(dy, torch.ones(64, 8, device=device), x)
    assert dx.shape == (0, 8) and db is None and (outer(x, dy, by_rank=False) == 0).all()


@pytest.fixture
def kernels(monkeypatch):
    """Which of the two products a kernel has made, by programs for as many rows as on a small GPU."""
    made, has = [], low_rank._has_kernel
    monkeypatch.setattr(low_rank, "num_multiprocessors", lambda _: 7)
    monkeypatch.setattr(low_rank, "_LEAST_ROWS", 0)
    monkeypatch.setattr(low_rank, "_has_kernel", lambda x, ranks: made.append(has(x, ranks)) or made[-1])
    return made


@pytest.mark.parametrize("ranks", [1, 16, 48, 64, 65])
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (130, 200)])
def test_product_with_a_few_ranks_is_that_of_fp64_rounded_once(device, rows, width, ranks, kernels, empty_is_nan):
    x = torch.randn(rows, width + 40, device=device).bfloat16()[:, 8 : width + 8]
    for a in (torch.randn(ranks, width, device=device).bfloat16(), torch.randn(width, ranks, device=device).t()):
        out, exact = project(x, a), x.double() @ a.bfloat16().double().t()
        assert kernels.pop() is (ranks <= 64 and use_kernels(x))
        assert out.dtype == x.dtype and error(out, exact) < 2**-8
        if ranks <= 64 and use_kernels(x):
            assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("ranks", [1, 16, 48, 64, 65])
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (300, 200)])
@pytest.mark.parametrize("stream", [None, torch.bfloat16, torch.float32], ids=str)
def test_outer_product_sums_over_rows_in_fp32(device, rows, width, ranks, stream, kernels, empty_is_nan):
    """Of rows as they are, or of a stream that is normed first."""
    d = torch.randn(rows, ranks + 7, device=device).bfloat16()[:, 7:]
    x = torch.randn(rows, width, device=device).to(stream or torch.bfloat16)
    given, expected = x, x
    if stream is not None:
        weight = torch.randn(width, device=device)
        done = rms_norm_forward(x, weight, 1e-6, offset=1.0, out_dtype=torch.bfloat16)
        given, expected = NormedRows(x, done.rstd_T, weight, 1.0, lambda _: done.y), done.y
    exact = d.double().t() @ expected.double()
    for out in (outer(d, given), outer(d, given, by_rank=False).t()):
        assert kernels.pop() is (ranks <= 64 and use_kernels(d))
        assert out.dtype == torch.float32 and error(out, exact) < (1e-5 if stream is None else 1e-4)


@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("ranks", [(16, 8), (48, 16, 3, 32), (16, 65), (4, 4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("longest", [64, 4096], ids=["several parts", "one part"])
def test_several_outer_products_are_those_made_one_by_one(
    device, rows, ranks, normed, longest, kernels, empty_is_nan, monkeypatch
):
    monkeypatch.setattr(low_rank, "_LONGEST_SUM", longest)
    monkeypatch.setattr(low_rank, "outer_rows", lambda itemsize: 32)
    splits, parts = low_rank._splits, []
    monkeypatch.setattr(low_rank, "_splits", lambda *given: parts.append(splits(*given)) or parts[-1])
    d, *others = (
        (torch.randn(rows, rank + 5, device=device).bfloat16()[:, 5:], torch.randn(rows, width, device=device))
        for rank, width in zip(ranks, (200, 96, 72, 130, 64), strict=False)
    )
    others = [(d_TR, x_TN.bfloat16()) for d_TR, x_TN in others]
    x = d[1].float()
    if normed:
        weight = torch.randn(x.shape[1], device=device)
        done = rms_norm_forward(x, weight, 1e-6, offset=0.0, out_dtype=torch.bfloat16)
        given = NormedRows(x, done.rstd_T, weight, 0.0, lambda _: done.y)
        x = done.y
    else:
        given = x = x.bfloat16()
    first, *rest = outers(d[0], given, others)
    assert all(rows_each <= longest for rows_each, _ in parts)
    assert kernels == [] if len(ranks) == 5 else all(kernels) is (max(ranks) <= 64 and use_kernels(x))
    assert error(first, d[0].double().t() @ x.double()) < (1e-4 if normed else 1e-5)
    for made, (d_TR, x_TN) in zip(rest, others, strict=True):
        assert made.dtype == torch.float32
        assert error(made, x_TN.double().t() @ d_TR.double()) < 1e-5


def test_outer_product_is_the_same_twice_to_the_bit_and_of_no_rows_zero(device):
    d, x = torch.randn(300, 16, device=device).bfloat16(), torch.randn(300, 200, device=device).bfloat16()
    assert torch.equal(outer(d, x), outer(d, x))
    assert (outer(d[:0], x[:0]) == 0).all() and project(x[:0], x[:3]).shape == (0, 3)
