"""The MLP block with adapters against PyTorch's own autograd in fp64, by itself."""

import pytest
import torch

from truetune.models import blocks
from truetune.models.blocks import GatedMlp, Norm
from truetune.ops import backend, lora
from truetune.ops.dropout import seeded_dropout
from truetune.ops.lora import DenseWeight, Linear
from truetune.ops.swiglu import glu_reference

T, H, WIDTH = 37, 24, 75
ADAPTED = {"gate and up": (True, True), "gate": (True, False), "up": (False, True), "none": (False, False)}


@pytest.fixture(params=["plain", "kernels"])
def device(request, monkeypatch):
    if request.param == "plain":
        return "cpu"
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "FORCE_KERNELS", True)
    return "cuda" if torch.cuda.is_available() else "cpu"


def make(device, adapted, joined=False, rank=4, dropout=0.0, **changes):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(device)

    def linear(n, k, has_adapter, bias=True):
        a, b = (
            (draw(rank, k).requires_grad_(), draw(n, rank, scale=0.5).requires_grad_()) if has_adapter else (None,) * 2
        )
        return Linear(DenseWeight(draw(n, k, scale=k**-0.5)), draw(n) if bias else None, a, b, 0.75, dropout)

    gate_up = [linear(2 * WIDTH if joined else WIDTH, H, each) for each in (adapted[:1] if joined else adapted)]
    block = GatedMlp(
        norm=Norm(draw(H) + 1, 1e-6, 0.0), gate_up=gate_up, activation="silu", down=linear(H, WIDTH, True, bias=False),
        post_norm=None, multiplier=1.0, dtype=torch.float32, **changes,
    )  # fmt: skip
    return block, draw(T, H).requires_grad_(), draw(T, H)


def ours(block, x, upstream):
    y = block(x)
    leaves = [x, *(t for linear in (*block.gate_up, block.down) for t in (linear.a_RK, linear.b_NR) if t is not None)]
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def exact(block, x, upstream):
    """With the masks of the block's last run."""
    leaves = [x.detach().double().requires_grad_()]

    def times(linear, x):
        y = x @ linear.weight.weight_NK.double().t()
        y = y if linear.bias_N is None else y + linear.bias_N.double()
        if linear.a_RK is None:
            return y
        a, b = (t.detach().double().requires_grad_() for t in (linear.a_RK, linear.b_NR))
        leaves.extend((a, b))
        ones = torch.ones_like(x, dtype=torch.float32)
        mask = seeded_dropout(ones, linear.dropout, linear.seed).double() if linear.dropout else 1.0
        return y + ((x * mask) @ a.t()) @ b.t() * linear.scaling

    weight, eps, _ = block.norm
    h = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + eps) * weight.double()
    gate_up = [times(linear, h) for linear in block.gate_up]
    act = glu_reference(*(gate_up[0].chunk(2, 1) if len(gate_up) == 1 else gate_up), block.activation)
    y = leaves[0] + times(block.down, act)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.double())]


def assert_exact(block, x, upstream):
    results = ours(block, x, upstream)
    for value, true in zip(results, exact(block, x, upstream), strict=True):
        assert ((value.double() - true).norm() / true.norm()).item() < 2e-6


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_results_and_gradients_are_those_of_autograd(device, adapted, recompute):
    assert_exact(*make(device, ADAPTED[adapted], recompute=recompute))


@pytest.mark.parametrize("rank", [1, 16, blocks.LATE_RANK + 1])
@pytest.mark.parametrize("joined", [False, True], ids=["gate, up", "gate_up"])
def test_ranks_of_every_size_beside_one_linear_or_two(device, joined, rank):
    assert_exact(*make(device, (True, True), joined, rank))


@pytest.mark.parametrize("joined", [False, True], ids=["gate, up", "gate_up"])
def test_what_drops_out_is_dropped_in_both_directions(device, joined):
    assert_exact(*make(device, (True, True), joined, dropout=0.3))


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_the_adapters_part_of_gate_and_up_is_never_written(device, recompute, monkeypatch):
    products = []

    def product(x_TR, b_NR, adds, out_TN):
        products.append(len(b_NR))
        return low_rank_product(x_TR, b_NR, adds, out_TN)

    low_rank_product = lora.low_rank_product
    monkeypatch.setattr(lora, "low_rank_product", product)
    ours(*make(device, (True, True), recompute=recompute))
    assert set(products) == {H}  # down's
    products.clear()
    ours(*make(device, (True, True), rank=blocks.LATE_RANK + 1, recompute=recompute))
    assert set(products) == {H, WIDTH}
