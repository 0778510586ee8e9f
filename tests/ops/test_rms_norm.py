"""RMSNorm: its error is at most 1.5 times that of Transformers' modules in the same dtype."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from truetune.ops.fp8 import quantize_rows_reference
from truetune.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(T, H, device, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, T, H, generator=rng)
    weight = 1 + 0.5 * torch.randn(H, generator=rng)
    return (x * 3).to(device, dtype), weight.to(device, dtype), dy.to(device, dtype)


def gradients(function, x, weight, dy):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def error(value, exact):
    return ((value.double().cpu() - exact.cpu()).norm() / exact.cpu().norm()).item()


@pytest.mark.parametrize(("T", "H"), [(5, 64), (3, 1000), (9, 129)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm])
def test_error_is_at_most_1_5_times_that_of_transformers(device, module, dtype, T, H):
    x, weight, dy = draw(T, H, device, dtype)
    offset = 1.0 if module is Gemma2RMSNorm else 0.0
    norm = module(H, eps=1e-5).to(device, dtype)

    def theirs(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    mine = gradients(lambda x, w: rms_norm(x, w, 1e-5, offset=offset), x, weight, dy)
    plain = gradients(theirs, x, weight, dy)
    exact = gradients(
        lambda x, w: rms_norm_reference(x, w, 1e-5, offset=offset), x.double(), weight.double(), dy.double()
    )
    assert [t.dtype for t in mine] == [dtype] * 3
    for a, b, true in zip(mine, plain, exact, strict=True):
        assert error(a, true) <= max(1.5 * error(b, true), 2e-7)


def test_a_sum_is_normalised_and_given_too(device):
    x, weight, added = draw(6, 96, device, torch.bfloat16)
    done = rms_norm_forward(x, weight, 1e-6, added_TH=added)
    assert torch.equal(done.sum_TH, x + added)
    assert torch.equal(done.y, rms_norm_forward(done.sum_TH, weight, 1e-6).y)


def test_a_residual_stream_is_added_after_the_norm_in_its_own_dtype(device):
    x, weight, residual = draw(6, 96, device, torch.float32)
    x = x.bfloat16()
    out = rms_norm_forward(x, weight, 1e-6, residual_TH=residual).y
    assert out.dtype == torch.float32
    assert error(out, residual.double() + rms_norm_reference(x.double(), weight.double(), 1e-6)) < 3e-7


def test_a_wider_stream_than_its_result(device):
    """fp32 weights under autocast: the stream is fp32, what the GEMM takes and gives back is bf16."""
    x, weight, dy = draw(6, 96, device, torch.float32)
    y, rstd, *_ = rms_norm_forward(x, weight, 1e-6, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    dx, dweight = rms_norm_backward(dy.bfloat16(), x, weight, rstd, needs_weight=True)
    exact = gradients(lambda x, w: rms_norm_reference(x, w, 1e-6), x.double(), weight.double(), dy.bfloat16().double())
    assert dx.dtype == torch.float32 and error(dx, exact[1]) < 3e-7
    assert dweight.dtype == torch.float32 and error(dweight, exact[2]) < 3e-7


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_partial_gradients_and_the_residuals_are_summed_in_fp32(device, parts):
    x, weight, residual = draw(7, 200, device, torch.bfloat16)
    dys = tuple(draw(7, 200, device, torch.bfloat16, seed=i)[2] for i in range(1, 1 + parts))
    rstd = rms_norm_forward(x, weight, 1e-6).rstd_T
    dx, none = rms_norm_backward(dys, x, weight, rstd, dresidual_TH=residual)
    total = sum(dy.double() for dy in dys)
    exact = gradients(lambda x, w: rms_norm_reference(x, w, 1e-6), x.double(), weight.double(), total)[1]
    assert none is None
    assert error(dx, exact + residual.double()) < 0.6 * torch.finfo(torch.bfloat16).eps


def test_rows_in_fp8_are_those_of_quantize_rows(device):
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 here")
    x, weight, _ = draw(5, 130, device, torch.float32)
    done = rms_norm_forward(x, weight, 1e-6, quantize=True)
    theirs, scale = quantize_rows_reference(done.y)
    assert torch.allclose(done.scale_T, scale, rtol=1e-6)
    assert (done.y8.float() - theirs.float()).abs().max() <= 32 and (done.y8.float() != theirs.float()).sum() <= 2


def test_strided_rows_and_no_rows(device):
    wide, weight, _ = draw(4, 256, device, torch.float32)
    x = wide[:, 64:192]
    assert torch.equal(
        rms_norm_forward(x, weight[:128], 1e-6).y, rms_norm_forward(x.contiguous(), weight[:128], 1e-6).y
    )
    empty = rms_norm_forward(x[:0], weight[:128], 1e-6)
    dx, dweight = rms_norm_backward(empty.y, x[:0], weight[:128], empty.rstd_T, needs_weight=True)
    assert dx.shape == (0, 128) and not dweight.any()
