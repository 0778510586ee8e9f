"""Rotary embedding and q/k-norm against Transformers' code: error at most 1.5 times its own, judged in fp64."""

from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as rotate_partly
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from truetune.ops.rope import rope, rope_backward, rope_forward, rope_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, EPS = 11, 1e-5


class Case(NamedTuple):
    heads: int
    key_heads: int
    D: int
    R: int
    norm: type | None = None
    offset: float = 0.0


CASES = {
    "llama": Case(4, 2, 64, 64),
    "llama-7-heads-of-80": Case(7, 1, 80, 80),
    "phi3": Case(3, 3, 96, 72),
    "qwen3": Case(4, 2, 128, 128, Qwen3RMSNorm),
    "qwen3-partly": Case(5, 1, 96, 24, Qwen3RMSNorm),
    "gemma3": Case(2, 1, 256, 256, Gemma3RMSNorm, 1.0),
}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(case, device, dtype):
    """cos and sin [T, R] of Transformers' module, for packed documents."""
    kind = Phi3Config if case.R < case.D else LlamaConfig
    config = kind(
        head_dim=case.D, hidden_size=case.D * case.heads, num_attention_heads=case.heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": case.R / case.D},
        pad_token_id=0,
    )  # fmt: skip
    module = (Phi3RotaryEmbedding if kind is Phi3Config else LlamaRotaryEmbedding)(config).to(device)
    position_ids = torch.cat((torch.arange(7), torch.arange(100, 104)))[None].to(device)
    cos, sin = module(torch.empty(1, device=device, dtype=dtype), position_ids)
    assert cos.shape == (1, T, case.R)
    return cos[0], sin[0]


def make(case, device, dtype):
    """q, k, dq, dk and the norms' weights: the same numbers on every device."""
    shapes = [(T, case.heads, case.D), (T, case.key_heads, case.D)] * 2
    tensors = [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    if case.norm is not None:
        tensors += [1 - case.offset + 0.3 * randn(case.D, seed=seed) for seed in (4, 5)]
    tensors = [tensor.to(device, dtype) for tensor in tensors]
    return tensors if case.norm is not None else [*tensors, None, None]


def as_transformers(case, q, k, dq, dk, q_weight, k_weight, cos, sin):
    """q, k, their gradients and those of the weights by Transformers' modules in the dtype of q."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    normed = leaves
    if case.norm is not None:
        norms = [case.norm(case.D, eps=EPS).to(q) for _ in range(2)]
        for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
            norm.weight.data.copy_(weight)
        normed = [norm(x) for norm, x in zip(norms, leaves, strict=True)]
        leaves = [*leaves, *(norm.weight for norm in norms)]
    function = rotate_partly if case.R < case.D else rotate
    results = function(*(x[None] for x in normed), cos[None], sin[None], unsqueeze_dim=2)
    grads = torch.autograd.grad(results, leaves, (dq[None], dk[None]))
    return *(x[0].detach() for x in results), *grads


def exact(case, q, k, dq, dk, q_weight, k_weight, cos, sin):
    """The same in fp64, without any of their code."""
    leaves = [x.double().requires_grad_() for x in (q, k, q_weight, k_weight) if x is not None]
    results = []
    for i in range(2):
        x = leaves[i]
        if case.norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (case.offset + leaves[2 + i])
        parts = x[..., : case.R // 2], x[..., case.R // 2 : case.R], x[..., case.R :]
        turned = torch.cat((-parts[1], parts[0]), -1)
        both = torch.cat(parts[:2], -1) * cos.double()[:, None] + turned * sin.double()[:, None]
        results.append(torch.cat((both, parts[2]), -1))
    return *(x.detach() for x in results), *torch.autograd.grad(results, leaves, (dq.double(), dk.double()))


def ours(case, q, k, dq, dk, q_weight, k_weight, cos, sin, *, needs_weight=True):
    norms = {} if case.norm is None else {"q_weight": q_weight, "k_weight": k_weight, "eps": EPS, "offset": case.offset}
    results = rope_forward(q, k, cos, sin, **norms)
    saved = {} if case.norm is None else {"q": q, "k": k, "needs_weight": needs_weight}
    grads = rope_backward(dq, dk, cos, sin, **norms, **saved)
    return *results, *(grad for grad in grads if grad is not None)


def error(value, exact):
    """Relative to the norm of what is exact."""
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_error_is_at_most_1_5_times_that_of_transformers(device, empty_is_nan, case, dtype):
    inputs = *make(case, device, dtype), *angles(case, device, dtype)
    before = [x.clone() for x in inputs if x is not None]
    results, plain, truth = (function(case, *inputs) for function in (ours, as_transformers, exact))
    assert all(torch.equal(a, b) for a, b in zip(before, (x for x in inputs if x is not None), strict=True))
    assert [x.dtype for x in results] == [dtype] * 4 + [torch.float32] * (len(results) - 4)
    for name, a, b, c in zip(("q", "k", "dq", "dk", "dq_weight", "dk_weight"), results, plain, truth, strict=False):
        assert error(a, c) <= max(1.5 * error(b, c), 3e-7), name
    assert len(results) == len(truth)
    without_weight = ours(case, *inputs, needs_weight=False)  # compiled apart: not the same to the bit
    for a, b, c in zip(without_weight, plain, truth, strict=False):
        assert error(a, c) <= max(1.5 * error(b, c), 3e-7)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_halves_of_cos_and_sin_may_differ_and_have_another_dtype(device, empty_is_nan, case):
    tensors = make(case, device, torch.bfloat16)
    cos, sin = (randn(T, case.R, seed=seed).to(device) for seed in (6, 7))
    for a, c in zip(ours(case, *tensors, cos, sin), exact(case, *tensors, cos, sin), strict=True):
        assert error(a, c) <= (1.02 * error(c.bfloat16(), c) if a.dtype == torch.bfloat16 else 3e-7)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_heads_and_tokens_may_be_strided_as_views_of_one_product(device, empty_is_nan, name):
    case = CASES[name]
    q, k, dq, dk, *weights = make(case, device, torch.float32)
    cos, sin = angles(case, device, torch.float32)
    expected = ours(case, q, k, dq, dk, *weights, cos, sin)
    views = []
    for a, b in ((q, k), (dq, dk)):
        merged = torch.cat((a, b, b), 1).flatten(1)  # [T, (H + 2 G) D], as a q/k/v projection gives it
        views += [x.unflatten(1, (-1, case.D)) for x in merged.split([a[0].numel(), b[0].numel(), b[0].numel()], 1)[:2]]
        views[-1] = views[-1].transpose(0, 1).contiguous().transpose(0, 1)  # [G, T, D], as attention may give it
    results = ours(case, *views, *weights, cos, sin)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("name", CASES)
def test_in_place(device, empty_is_nan, name):
    case = CASES[name]
    q, k, dq, dk, q_weight, k_weight = make(case, device, torch.bfloat16)
    cos, sin = angles(case, device, torch.bfloat16)
    expected = ours(case, q, k, dq, dk, q_weight, k_weight, cos, sin)
    norms = {"q_weight": q_weight, "k_weight": k_weight, "eps": EPS, "offset": case.offset, "needs_weight": True}
    backward = {} if case.norm is None else norms | {"q": q, "k": k}
    buffer = torch.cat((dq, dk), 1)
    dq, dk = buffer.split([case.heads, case.key_heads], 1)
    new_dq, new_dk, *dweights = rope_backward(dq, dk, cos, sin, inplace=True, **backward)
    assert new_dq is dq and new_dk is dk
    assert torch.equal(buffer, torch.cat(expected[2:4], 1))
    assert all(torch.equal(a, b) for a, b in zip(dweights, expected[4:], strict=False))
    if case.norm is None:
        buffer = torch.cat((q, k), 1)
        q, k = buffer.split([case.heads, case.key_heads], 1)
        rope_forward(q, k, cos, sin, inplace=True)
        assert torch.equal(buffer, torch.cat(expected[:2], 1))


def test_weight_gradients_are_those_of_all_tokens_and_the_same_in_every_run(device):
    """Of more tokens than there are programs."""
    case = Case(2, 1, 32, 16, Qwen3RMSNorm)
    q, k, dq, dk = (randn(45, heads, 32, seed=seed).to(device) for seed, heads in enumerate((2, 1, 2, 1)))
    weights = [randn(32, seed=seed).to(device) for seed in (4, 5)]
    cos, sin = (randn(45, 16, seed=seed).to(device) for seed in (6, 7))
    first, second = (ours(case, q, k, dq, dk, *weights, cos, sin) for _ in range(2))
    for a, b, c in zip(first, second, exact(case, q, k, dq, dk, *weights, cos, sin), strict=True):
        assert torch.equal(a, b) and error(a, c) <= 3e-7


def test_no_tokens(device):
    case = CASES["qwen3"]
    q, k, dq, dk, *weights = make(case, device, torch.bfloat16)
    cos, sin = angles(case, device, torch.bfloat16)
    results = ours(case, q[:0], k[:0], dq[:0], dk[:0], *weights, cos[:0], sin[:0])
    assert [x.shape for x in results] == [q[:0].shape, k[:0].shape] * 2 + [(case.D,)] * 2
    assert not results[4].any() and not results[5].any()


@pytest.mark.parametrize("name", ["phi3", "gemma3"])
def test_public_function_is_differentiable(device, name):
    case = CASES[name]
    q, k, _, _, q_weight, k_weight = make(case, device, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, q_weight, k_weight) if x is not None]
    cos, sin = angles(case, device, torch.float32)
    q_out, k_out = rope(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=EPS, offset=case.offset)
    # the gradient of a sum is one number with strides of 0
    grads = torch.autograd.grad(q_out.sum() + 2 * k_out.sum(), leaves)
    ones = torch.ones_like(q), torch.full_like(k, 2)
    truth = exact(case, q, k, *ones, q_weight, k_weight, cos, sin)
    for a, c in zip(grads, truth[2:], strict=True):
        assert error(a, c) <= 1e-6
    plain = rope_reference(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, eps=EPS, offset=case.offset)
    torch.testing.assert_close((q_out, k_out), plain)


def test_gradients_are_exact_in_fp64():
    q, k, cos, sin = (randn(*shape, seed=1).double() for shape in ((3, 2, 6), (3, 1, 6), (3, 4), (3, 4)))
    weights = [randn(6, seed=seed).double().requires_grad_() for seed in (2, 3)]
    q.requires_grad_()
    k.requires_grad_()
    torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    torch.autograd.gradcheck(
        lambda q, k, *weights: rope(q, k, cos, sin, q_weight=weights[0], k_weight=weights[1], eps=EPS, offset=1.0),
        (q, k, *weights),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGpu:
    @pytest.mark.parametrize(("heads", "key_heads", "tokens"), [(16, 8, 5000), (64, 8, 3000), (28, 4, 3000)])
    @pytest.mark.parametrize("norm", [None, Qwen3RMSNorm])
    def test_real_shapes_in_place_and_out_of_place(self, heads, key_heads, tokens, norm):
        case = Case(heads, key_heads, 128, 128, norm)
        q, k, dq, dk = (
            torch.randn(tokens, n, 128, device="cuda", dtype=torch.bfloat16) for n in (heads, key_heads) * 2
        )
        weights = [None, None] if norm is None else [torch.rand(128, device="cuda").bfloat16() for _ in range(2)]
        cos, sin = (torch.randn(tokens, 128, device="cuda").bfloat16() for _ in range(2))
        results, plain, truth = (f(case, q, k, dq, dk, *weights, cos, sin) for f in (ours, as_transformers, exact))
        for a, b, c in zip(results, plain, truth, strict=True):
            assert error(a, c) <= max(1.5 * error(b, c), 1e-6)
        options = {} if norm is None else {"q": q, "k": k, "q_weight": weights[0], "k_weight": weights[1], "eps": EPS}
        rope_backward(dq, dk, cos, sin, inplace=True, **options)
        assert torch.equal(dq, results[2]) and torch.equal(dk, results[3])

    def test_host_never_waits_for_the_device(self):
        case = CASES["qwen3"]
        inputs = *make(case, "cuda", torch.bfloat16), *angles(case, "cuda", torch.bfloat16)
        ours(case, *inputs)  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(case, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
