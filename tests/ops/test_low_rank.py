"""Products with a small rank: sums in fp32, whatever the strides."""

import pytest
import torch

from truetune.ops.low_rank import low_rank_backward, low_rank_product


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
    assert error(low_rank_product(x, b, (add, add, add), out.fill_(float("nan"))), exact + 3 * add) < 1e-6


@pytest.mark.parametrize("rank", [1, 8, 16, 32, 40])
@pytest.mark.parametrize("rows", [1, 150])
def test_gradients_of_a_low_rank_product_are_those_of_fp64(device, rank, rows, empty_is_nan):
    dy = torch.randn(rows, 900, device=device).bfloat16()[:, 100:700]
    x = torch.randn(rows, 3 * rank, device=device).bfloat16()[:, rank : 2 * rank]
    b = torch.randn(600, rank, device=device)
    dx, db = low_rank_backward(dy, b, x)
    assert dx.shape == x.shape and dx.dtype == dy.dtype and db.shape == b.shape and db.dtype == torch.float32
    exact = dy.double() @ b.bfloat16().double()
    assert ((dx.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
    assert error(db, dy.double().t() @ x.double()) < 1e-5


def test_wide_results_have_the_same_gradients_in_one_pass(any_device):
    """As wide as it takes for the one pass on a GPU; twice to the bit."""
    dy = torch.randn(1000, 4096, device=any_device).bfloat16()
    x, b = torch.randn(1000, 16, device=any_device).bfloat16(), torch.randn(4096, 16, device=any_device)
    (dx, db), (again_dx, again_db) = low_rank_backward(dy, b, x), low_rank_backward(dy, b, x)
    assert torch.equal(dx, again_dx) and torch.equal(db, again_db)
    assert error(dx, dy.double() @ b.bfloat16().double()) < 2**-9
    assert error(db, dy.double().t() @ x.double()) < 1e-4


def test_no_rows_have_no_gradient(device):
    dy, x, b = torch.ones(0, 64, device=device).bfloat16(), torch.ones(0, 8, device=device).bfloat16(), None
    b = torch.ones(64, 8, device=device)
    dx, db = low_rank_backward(dy, b, x)
    assert dx.shape == (0, 8) and (db == 0).all()
