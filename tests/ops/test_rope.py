"""Rotary embedding, with and without the heads' norm, against Transformers' functions and fp64."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as apply_partial
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from truetune.ops.rope import rope, rope_backward, rope_forward, rope_reference

SHAPES = [(5, 4, 2, 64, 64), (3, 9, 3, 80, 80), (4, 2, 1, 96, 48)]  # T, Q, G, D, R


def draw(shape, device, dtype):
    T, Q, G, D, R = shape
    rng = torch.Generator().manual_seed(0)

    def new(*size):
        return torch.randn(*size, generator=rng).to(device, dtype)

    angle = torch.rand(T, R, generator=rng) * 6  # two different halves, which no model has and nothing forbids
    tables = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    return new(T, Q, D), new(T, G, D), *tables, 1 + 0.3 * new(D), 1 + 0.3 * new(D), (new(T, Q, D), new(T, G, D))


def plain(q, k, cos, sin, q_weight, k_weight, normed):
    """As Transformers does it."""
    if normed:
        norm = Qwen3RMSNorm(q.shape[-1], eps=1e-6).to(q.device, q.dtype)
        q, k = (
            torch.func.functional_call(norm, {"weight": weight}, (x,)) for x, weight in ((q, q_weight), (k, k_weight))
        )
    apply = apply_rotary_pos_emb if cos.shape[-1] == q.shape[-1] else apply_partial
    rotated = apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
    return [x[0].transpose(0, 1) for x in rotated]


def results(function, tensors, dys, normed):
    q, k, cos, sin, q_weight, k_weight = tensors
    leaves = [x.detach().requires_grad_() for x in ((q, k, q_weight, k_weight) if normed else (q, k))]
    weights = leaves[2:] if normed else (None, None)
    out = function(*leaves[:2], cos, sin, *weights)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, dys)]


def error(value, exact):
    return ((value.double().cpu() - exact.cpu()).norm() / exact.cpu().norm()).item()


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "q/k-norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_1_5_times_that_of_transformers(device, shape, dtype, normed):
    *tensors, dys = draw(shape, device, dtype)
    eps = {"eps": 1e-6} if normed else {}
    mine = results(lambda q, k, c, s, qw, kw: rope(q, k, c, s, q_weight=qw, k_weight=kw, **eps), tensors, dys, normed)
    theirs = results(lambda *x: plain(*x, normed), tensors, dys, normed)
    exact = results(
        lambda q, k, c, s, qw, kw: rope_reference(q, k, c, s, q_weight=qw, k_weight=kw, **eps),
        [x.double() for x in tensors], [x.double() for x in dys], normed,
    )  # fmt: skip
    for a, b, true in zip(mine, theirs, exact, strict=True):
        assert error(a, true) <= max(1.5 * error(b, true), 2e-7)


def test_views_of_one_projection_and_results_in_place(device):
    q, k, cos, sin, *_ = draw((6, 4, 2, 64, 64), device, torch.float32)
    both = torch.cat((q.flatten(1), torch.zeros(6, 10, device=device), k.flatten(1)), 1)
    views = both[:, :256].unflatten(1, (4, 64)), both[:, 266:].unflatten(1, (2, 64))
    separate, viewed = rope_forward(q, k, cos, sin), rope_forward(*views, cos, sin)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(separate, viewed, strict=True))
    in_place = rope_forward(q, k, cos, sin, inplace=True)
    assert in_place[0].data_ptr() == q.data_ptr() and torch.equal(q, separate[0]) and torch.equal(k, separate[1])


def test_rotating_back_undoes_the_rotation(device):
    q, k, cos, sin, *_ = draw((6, 4, 2, 64, 64), device, torch.float32)
    half = cos.shape[1] // 2
    cos, sin = (torch.cat((x[:, :half], x[:, :half]), 1) for x in (cos, sin))
    back = rope_backward(*rope_forward(q, k, cos, sin), cos, sin)[:2]
    assert error(back[0], q.double()) < 1e-6 and error(back[1], k.double()) < 1e-6


def test_no_tokens(device):
    q, k, cos, sin, *_ = draw((6, 4, 2, 64, 64), device, torch.float32)
    out = rope_forward(q[:0], k[:0], cos[:0], sin[:0])
    assert out[0].shape == (0, 4, 64)
