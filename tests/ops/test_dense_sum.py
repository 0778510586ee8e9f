"""Sums of bf16 products in one launch: those of fp64 rounded once, whatever is added and however operands lie."""

import pytest
import torch

from truetune.ops import backend, dense_sum, lora
from truetune.ops.lora import DenseWeight, Linear, linears_backward_input, linears_forward

T, N = 70, 272
WIDTHS = [(96,), (160, 64), (64, 32, 48)]


@pytest.fixture(autouse=True)
def _of_any_size(device, monkeypatch):
    monkeypatch.setattr(dense_sum, "_LEAST_FLOPS", 0)
    monkeypatch.setattr(dense_sum, "_LONGEST_FLAT", 96)
    if not (backend.FORCE_KERNELS or (device == "cuda" and torch.cuda.get_device_capability() == (9, 0))):
        pytest.skip("has a kernel on Hopper alone")


def randn(device, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)


def products_of(device, widths, by_k):
    products = []
    for i, K in enumerate(widths):
        weight = randn(device, *((K, N) if by_k else (N, K)), seed=10 + i) * K**-0.5
        products.append((randn(device, T, K, seed=i), weight if by_k else weight.t()))
    return products


def assert_rounded_once(value, parts):
    exact, size = parts.sum(0), parts.abs().sum(0)
    assert value.dtype == torch.bfloat16
    assert ((value.double() - exact).abs() <= exact.abs() * 2**-8 + size * 1e-5).all()


@pytest.mark.parametrize("by_k", [False, True], ids=["weights", "transposed weights"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rank", [None, 8, 48])
@pytest.mark.parametrize("add", [False, True])
def test_sum_is_that_of_fp64_rounded_once(device, by_k, widths, rank, add, empty_is_nan):
    products, low_rank = products_of(device, widths, by_k), None
    parts = [x.double() @ b.double() for x, b in products]
    if rank is not None:
        b = randn(device, N, rank, seed=21).float() * 0.1
        low_rank = randn(device, T, 2 * rank, seed=20)[:, rank:], b.t().contiguous().t() if by_k else b
        parts.append(low_rank[0].double() @ b.bfloat16().double().t())
    addend = randn(device, T, 2 * N, seed=22)[:, N:] if add else None
    parts += [] if addend is None else [addend.double()]
    alone = len(widths) == 1 and rank is None and not add
    assert dense_sum.sums_in_one_launch(products, low_rank, addend) is not alone
    before = None if addend is None else addend.clone()
    assert_rounded_once(dense_sum.dense_sum(products, low_rank=low_rank, add_TN=addend), torch.stack(parts))
    assert addend is None or torch.equal(addend, before)


def test_what_does_not_come_by_tma_is_left_to_others(device):
    ((x, b),) = products_of(device, (96,), True)
    low_rank = randn(device, T, 16), randn(device, N, 16)
    assert dense_sum.sums_in_one_launch([(x, b)], low_rank, None)
    wide = randn(device, T, 100)
    for others in (
        ([(wide[:, 3:99], b)], low_rank, None),
        ([(x.float(), b.float())], low_rank, None),
        ([(x, b)], (low_rank[0][:, :12], low_rank[1][:, :12]), None),
        ([(x, b)], low_rank, randn(device, T, N).float()),
        ([(x, b), (x, b.t().contiguous().t())], low_rank, None),
        ([(x, b[:, :100])], None, randn(device, T, 104)[:, :100]),  # rows of the result
        ([(x, b)], (low_rank[0], randn(device, 16, N).t()[:100]), None),  # of the adapter by ranks
        ([(x, b)], (low_rank[0].float(), low_rank[1]), None),
        ([(x, b)] * 4, low_rank, None),
        ([(x[:0], b)], low_rank, None),
    ):
        assert not dense_sum.sums_in_one_launch(*others)


@pytest.fixture
def launches(monkeypatch):
    made, one = [], dense_sum.dense_sum
    monkeypatch.setattr(lora, "dense_sum", lambda *args, **kw: made.append(len(args[0])) or one(*args, **kw))
    return made


def test_linears_go_through_it_forward_and_backward(device, launches):
    linears = [
        Linear(
            DenseWeight(randn(device, n, 96, seed=n)), None, torch.randn(8, 96).to(device), torch.randn(n, 8).to(device)
        )
        for n in (48, 32)
    ]
    x, residual = randn(device, T, 96), randn(device, T, 48)
    (first, second), xa = linears_forward(x, linears)
    (streamed,), _ = linears_forward(x, linears[:1], residual_TN=residual)
    dx, adapters = linears_backward_input((first, second), xa, linears)
    assert launches == [1, 1, 1, 2]
    assert adapters is not None

    def exact(linear):
        a, b = linear.a_RK.bfloat16().double(), linear.b_NR.bfloat16().double()
        return x.double() @ linear.weight.weight_NK.double().t(), (x.double() @ a.t()).bfloat16().double() @ b.t()

    for out, linear in zip((first, second), linears, strict=True):
        assert_rounded_once(out, torch.stack(exact(linear)))
    assert_rounded_once(streamed, torch.stack([*exact(linears[0]), residual.double()]))
    parts = [
        dy.double() @ linear.weight.weight_NK.double() for dy, linear in zip((first, second), linears, strict=True)
    ]
    a = torch.cat([linear.a_RK for linear in linears]).bfloat16()
    assert_rounded_once(dx, torch.stack([*parts, adapters.dxa_TS.double() @ a.double()]))


def test_a_gradient_through_dropout_is_one_of_the_terms(device, launches, monkeypatch):
    linear = Linear(
        DenseWeight(randn(device, 48, 96)), None, torch.randn(8, 96).to(device), torch.randn(48, 8).to(device)
    )
    linear.dropout, linear.seed = 0.5, 7
    dy, xa = randn(device, T, 48), randn(device, T, 8)
    ours, _ = linears_backward_input((dy,), xa, (linear,))
    assert launches == [1]
    monkeypatch.setattr(lora, "sums_in_one_launch", lambda *_: False)
    other, _ = linears_backward_input((dy,), xa, (linear,))
    assert ((ours.double() - other.double()).norm() / other.double().norm()).item() < 2**-7
