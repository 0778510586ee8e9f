"""Tensors of more than 2**31 elements, as one long document makes them: their last rows are what these give alone."""

import pytest
import torch

from truetune.ops.dropout import seeded_dropout
from truetune.ops.fp8 import Fp8Product, quantize_rows, why_not_fp8
from truetune.ops.fp8_sum import fp8_sum
from truetune.ops.low_rank import low_rank_backward, low_rank_product
from truetune.ops.rms_norm import rms_norm_backward, rms_norm_forward
from truetune.ops.rope import rope_backward, rope_forward
from truetune.ops.swiglu import glu_backward, glu_forward

HIDDEN, LAST = 4096, 64
TOKENS = 2**31 // HIDDEN + LAST

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30,
        reason="needs a CUDA device of 60 GiB",
    ),
]


@pytest.fixture(autouse=True)
def _memory_is_returned():
    yield
    torch.cuda.empty_cache()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def last(x):
    return x[-LAST:].clone()


def assert_same(whole, alone):
    for of_all, of_last in zip(whole, alone, strict=True):
        torch.testing.assert_close(of_all[-LAST:], of_last, rtol=0, atol=0)


def test_rms_norm():
    x, added, weight = randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN), randn(HIDDEN)
    whole = rms_norm_forward(x, weight, 1e-6, added_TH=added)[:3]
    assert_same(whole, rms_norm_forward(last(x), weight, 1e-6, added_TH=last(added))[:3])
    _, rstd, x = whole
    dy = added
    (alone, _) = rms_norm_backward(last(dy), last(x), weight, last(rstd), dresidual_TH=last(dy))
    (dx, dweight) = rms_norm_backward(dy, x, weight, rstd, dresidual_TH=dy, needs_weight=True)
    torch.testing.assert_close(dx[-LAST:], alone, rtol=2**-7, atol=2**-7)  # with dweight, by other tiles
    expected = torch.zeros(HIDDEN, dtype=torch.float64, device="cuda")
    for rows in zip(dy.split(2**14), x.split(2**14), rstd.split(2**14), strict=True):
        dy_rows, x_rows, rstd_rows = (tensor.double() for tensor in rows)
        expected += (dy_rows * x_rows * rstd_rows[:, None]).sum(0)
    assert (dweight - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("with_norms", [False, True])
def test_rope(with_norms):
    heads, key_heads, D = HIDDEN // 128, 8, 128
    q, k = randn(TOKENS, heads, D), randn(TOKENS, key_heads, D)
    cos, sin = randn(TOKENS, D), randn(TOKENS, D)
    norms = {"q_weight": randn(D), "k_weight": randn(D), "eps": 1e-6} if with_norms else {}
    alone = rope_forward(last(q), last(k), last(cos), last(sin), **norms)
    assert_same(rope_forward(q, k, cos, sin, **norms), alone)
    inputs = {"q": q, "k": k} if with_norms else {}
    inputs_alone = {name: last(x) for name, x in inputs.items()}
    dq, dk = randn(TOKENS, heads, D), randn(TOKENS, key_heads, D)
    alone = rope_backward(last(dq), last(dk), last(cos), last(sin), **inputs_alone, **norms)[:2]
    assert_same(rope_backward(dq, dk, cos, sin, **inputs, **norms, inplace=True)[:2], alone)


@pytest.mark.parametrize("width", [HIDDEN, 14336])
def test_glu(width):
    tokens = 2**31 // width + LAST
    gate, up = randn(tokens, width), randn(tokens, width)
    alone = glu_forward(last(gate), last(up), "silu")[:1]
    (act,) = whole = glu_forward(gate, up, "silu")[:1]
    assert_same(whole, alone)
    alone = glu_backward(last(act), last(gate), last(up), "silu")[:3]
    assert_same(glu_backward(act, gate, up, "silu", act_out=act)[:3], alone)


def test_halves_of_one_buffer():
    gate_up = randn(TOKENS // 2, 2 * HIDDEN)
    gate, up = gate_up.chunk(2, 1)
    assert_same(glu_forward(gate, up, "silu")[:1], glu_forward(last(gate), last(up), "silu")[:1])


def test_low_rank():
    x, b, add = randn(TOKENS, 16), randn(HIDDEN, 16), randn(TOKENS, HIDDEN)
    alone = low_rank_product(last(x), b, [last(add)], randn(LAST, HIDDEN))
    assert_same([low_rank_product(x, b, [add], torch.empty_like(add))], [alone])
    dx, db = low_rank_backward(add, b, x)
    torch.testing.assert_close(dx[-LAST:], last(add) @ b)
    expected = torch.zeros(HIDDEN, 16, dtype=torch.float64, device="cuda")
    for rows, x_rows in zip(add.split(2**14), x.split(2**14), strict=True):
        expected += rows.double().t() @ x_rows.double()
    assert (db - expected).norm() < 1e-4 * expected.norm()


def test_dropout():
    x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    out = seeded_dropout(x, 0.25, seed=3)
    assert out[-LAST:].ne(0).float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert not torch.equal(out[-LAST:], out[:LAST])
    assert torch.equal(seeded_dropout(x, 0.25, seed=3, add_TK=out)[-LAST:], 2 * out[-LAST:])


def test_fp8():
    if reason := why_not_fp8("cuda"):
        pytest.skip(reason)
    x = randn(TOKENS, HIDDEN)
    x8, scale = quantize_rows(x)
    x8_last, scale_last = quantize_rows(last(x))
    assert_same([x8.view(torch.uint8), scale], [x8_last.view(torch.uint8), scale_last])
    weight8, weight_scale = quantize_rows(randn(HIDDEN, HIDDEN))
    a, b = randn(TOKENS, 16), randn(HIDDEN, 16)
    whole = fp8_sum([Fp8Product(x8, scale, weight8, weight_scale[None, :])], low_rank=(a, b))
    alone = fp8_sum([Fp8Product(x8_last, scale_last, weight8, weight_scale[None, :])], low_rank=(last(a), b))
    torch.testing.assert_close(whole[-LAST:], alone)
