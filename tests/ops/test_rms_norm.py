"""RMSNorm against Transformers' modules: its error may be at most 1.5 times theirs, judged in fp64."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from truetune.ops.fp8 import quantize_rows
from truetune.ops.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(37, 64), (5, 129), (19, 1000), (21, 1024), (3, 5120), (2, 16384)]
EPS = 1e-5
MODULES = {"llama": (LlamaRMSNorm, 0.0), "gemma2": (Gemma2RMSNorm, 1.0)}


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def make(device, dtype, T, H, offset=0.0):
    """x_TH of rows between 0.01 and 10, a weight about 1, dy_TH: the same numbers on every device."""
    x = randn(T, H) * torch.logspace(-2, 1, T)[:, None]
    weight, dy = 1 - offset + randn(H, seed=1, scale=0.3), randn(T, H, seed=2)
    return [tensor.to(device, dtype) for tensor in (x, weight, dy)]


def error(value, exact):
    """Relative to the norm of what is exact."""
    return ((value.double() - exact).norm() / exact.norm()).item()


def as_transformers(module_class, x, weight, dy):
    """y, dx and dweight by a real module, in the dtype of x."""
    module = module_class(x.shape[-1], EPS).to(x.device, x.dtype)
    module.weight.data.copy_(weight)
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), *torch.autograd.grad(y, (x, module.weight), dy)


def exact(x, weight, dys, offset, *, residual=None, added=None, dresidual=None):
    """y, dx and dweight in fp64, by autograd."""
    x, weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    z = x if added is None else x + added.double()
    y = z * (z.square().mean(-1, keepdim=True) + EPS).rsqrt() * (offset + weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), sum(dy.double() for dy in dys))
    y = y.detach()
    return y if residual is None else y + residual.double(), dx if dresidual is None else dx + dresidual, dweight


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_1_5_times_that_of_transformers(device, empty_is_nan, dtype, shape, kind):
    module_class, offset = MODULES[kind]
    x, weight, dy = make(device, dtype, *shape, offset)
    y, rstd, *rest = rms_norm_forward(x, weight, EPS, offset=offset)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, offset=offset, needs_weight=True)
    assert rest == [None, None, None]
    assert (y.dtype, dx.dtype, rstd.dtype, dweight.dtype) == (dtype, dtype, torch.float32, torch.float32)
    dx_alone = rms_norm_backward(dy, x, weight, rstd, offset=offset)[0]  # compiled apart: not the same to the bit
    plain = as_transformers(module_class, x, weight, dy)
    truth = exact(x, weight, (dy,), offset)
    for name, a, b, c in zip(("y", "dx", "dweight"), (y, dx, dweight), plain, truth, strict=True):
        assert error(a, c) <= max(1.5 * error(b, c), 3e-7), name
    assert error(dx_alone, truth[1]) <= max(1.5 * error(plain[1], truth[1]), 3e-7)


@pytest.mark.parametrize("shape", [(37, 128), (19, 1000)], ids=str)
def test_residual_stream_in_fp32_under_half_precision_weights_and_gradients(device, empty_is_nan, shape):
    x, weight, dy = make(device, torch.float32, *shape)
    weight, dy = weight.half(), dy.bfloat16()
    y, rstd, *_ = rms_norm_forward(x, weight, EPS, out_dtype=torch.bfloat16)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, needs_weight=True)
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.float32)
    truth = exact(x, weight, (dy,), 0.0)
    rounding = error(truth[0].bfloat16(), truth[0])
    for value, true, bound in zip((y, dx, dweight), truth, (1.01 * rounding, 3e-7, 3e-7), strict=True):
        assert error(value, true) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37, 128), (19, 1000)], ids=str)
def test_additions_before_and_after_the_norm_are_rounded_once(device, empty_is_nan, dtype, shape):
    x, weight, dy = make(device, dtype, *shape)
    other = randn(*shape, seed=3).to(device, dtype)

    done = rms_norm_forward(x, weight, EPS, added_TH=other)
    assert torch.equal(done.sum_TH, x + other)
    unfused = rms_norm_forward(x + other, weight, EPS)
    assert torch.equal(done.y, unfused.y) and torch.equal(done.rstd_T, unfused.rstd_T)

    truth = exact(x, weight, (dy,), 0.0, residual=other, dresidual=other)
    y, rstd, *_ = rms_norm_forward(x, weight, EPS, residual_TH=other)
    assert error(y, truth[0]) <= max(1.01 * error(truth[0].to(dtype), truth[0]), 1e-7)
    dx, _ = rms_norm_backward(dy, x, weight, rstd, dresidual_TH=other)
    assert error(dx, truth[1]) <= max(1.01 * error(truth[1].to(dtype), truth[1]), 3e-7)
    in_place = other.clone()
    assert rms_norm_backward(dy, x, weight, rstd, dresidual_TH=in_place, out=in_place)[0] is in_place
    assert torch.equal(in_place, dx)


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_several_readers_are_summed_in_fp32(device, empty_is_nan, count):
    x, weight, _ = make(device, torch.bfloat16, 19, 1000)
    dys = tuple(randn(19, 1000, seed=4 + i).to(device, torch.bfloat16) for i in range(count))
    _, rstd, *_ = rms_norm_forward(x, weight, EPS)
    dx, dweight = rms_norm_backward(dys, x, weight, rstd, needs_weight=True)
    _, true_dx, true_dweight = exact(x, weight, dys, 0.0)
    assert error(dx, true_dx) <= 1.01 * error(true_dx.bfloat16(), true_dx)
    assert error(dweight, true_dweight) <= 3e-7


def test_rows_may_be_strided(device, empty_is_nan):
    T, H = 19, 129

    def strided(seed):
        return randn(T, (2 + seed) * H, seed=seed).to(device)[:, H : 2 * H]  # another stride each

    x, added, residual, dy_a, dy_b, dy_c, dresidual, out = (strided(seed) for seed in range(8))
    weight = randn(H, seed=9).to(device)
    ours = rms_norm_forward(x, weight, EPS, added_TH=added, residual_TH=residual)
    same = rms_norm_forward(x.contiguous(), weight, EPS, added_TH=added.contiguous(), residual_TH=residual.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(ours[:3], same[:3], strict=True))
    dys = (dy_a, dy_b, dy_c)
    dx, _ = rms_norm_backward(dys, x, weight, ours.rstd_T, dresidual_TH=dresidual, out=out)
    other = tuple(dy.contiguous() for dy in dys)
    true_dx, _ = rms_norm_backward(other, x.contiguous(), weight, ours.rstd_T, dresidual_TH=dresidual.contiguous())
    assert dx is out and torch.equal(out, true_dx)


@pytest.mark.parametrize("shape", [(37, 128), (5, 1000)], ids=str)
def test_fp8_output_is_what_quantize_rows_makes_of_y(device, empty_is_nan, shape):
    """So that a fused norm and an FP8 linear that quantizes its own input give the same product, to the bit."""
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")
    x, weight, _ = make(device, torch.bfloat16, *shape)
    x[3] = 0
    done = rms_norm_forward(x, weight, EPS, quantize=True)
    y8, scale_T = quantize_rows(done.y)
    assert torch.equal(done.y8.view(torch.uint8), y8.view(torch.uint8))
    assert torch.equal(done.scale_T, scale_T)
    assert torch.equal(done.y, rms_norm_forward(x, weight, EPS).y)
    assert not done.y8[3].float().any()


def test_no_rows(device):
    x, weight, dy = make(device, torch.bfloat16, 0, 64)
    y, rstd, total, y8, scale = rms_norm_forward(x, weight, EPS, added_TH=x, quantize=True)
    assert y.shape == total.shape == y8.shape == (0, 64) and rstd.shape == scale.shape == (0,)
    dx, dweight = rms_norm_backward(dy, x, weight, rstd, needs_weight=True)
    assert dx.shape == (0, 64) and dweight.shape == (64,) and not dweight.any()


def test_weight_gradient_is_the_same_in_every_run(device):
    x, weight, dy = make(device, torch.bfloat16, 300, 64)
    _, rstd, *_ = rms_norm_forward(x, weight, EPS)
    runs = [rms_norm_backward(dy, x, weight, rstd, needs_weight=True)[1] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_public_function_gives_gradients_of_any_shape_and_stride(device):
    x, weight, _ = make(device, torch.float32, 6, 64)
    x = x.view(2, 3, 64).transpose(0, 1).requires_grad_()
    weight.requires_grad_()
    grads = torch.autograd.grad(rms_norm(x, weight, EPS, offset=1.0).sum(), (x, weight))
    y = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (1 + weight)
    torch.testing.assert_close(grads, torch.autograd.grad(y.sum(), (x, weight)))


def test_gradients_are_exact_in_fp64():
    x, weight = (randn(*shape).double().requires_grad_() for shape in ((3, 5), (5,)))
    torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS, offset=1.0), (x, weight))
    torch.testing.assert_close(rms_norm(x, weight, EPS, offset=1.0), rms_norm_reference(x, weight, EPS, offset=1.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGpu:
    def test_rows_beyond_two_to_the_31_elements(self):
        x = torch.zeros(2**20 + 1, 2**11, device="cuda", dtype=torch.bfloat16)
        x[-1] = randn(2**11).to(x)
        weight = torch.ones(2**11, device="cuda")
        y, rstd, *_ = rms_norm_forward(x, weight, EPS)
        assert torch.equal(y[-1:], rms_norm_forward(x[-1:].clone(), weight, EPS).y)
        dx, _ = rms_norm_backward(y, x, weight, rstd)
        assert torch.equal(dx[-1:], rms_norm_backward(y[-1:].clone(), x[-1:].clone(), weight, rstd[-1:].clone())[0])

    def test_host_never_waits_for_the_device(self):
        x, weight, dy = make("cuda", torch.bfloat16, 300, 1024)

        def step():
            _, rstd, *_ = rms_norm_forward(x, weight, EPS, added_TH=x)
            rms_norm_backward(dy, x, weight, rstd, needs_weight=True)

        step()  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
