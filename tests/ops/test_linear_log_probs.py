"""Log-probabilities with any gradient a row, against PyTorch with the full logits."""

from importlib import import_module

import pytest
import torch

from truetune.ops import linear_log_probs

module = import_module("truetune.ops.linear_log_probs")
reference = module.linear_log_probs_reference


def make(device, dtype, N=8, H=72, V=603):
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=rng)
    weight = torch.randn(V, H, generator=rng) * 3 / H**0.5
    labels = torch.randint(0, V, (N,), generator=rng)
    labels[2] = -100
    return *(x.to(device, dtype).requires_grad_() for x in (hidden, weight)), labels.to(device)


def run(function, hidden, weight, labels, upstream_K, **options):
    log_probs_K = function(hidden, weight, labels, **options)
    return log_probs_K.detach(), *torch.autograd.grad(log_probs_K, (hidden, weight), upstream_K.to(log_probs_K.dtype))


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "logit_scale": 0.7}], ids=["plain", "softcap"])
def test_error_is_at_most_1_5_times_that_of_plain_pytorch(device, dtype, options, small_chunks):
    hidden, weight, labels = make(device, dtype)
    upstream_K = torch.linspace(-1, 2, 7, device=device)
    ours = run(linear_log_probs, hidden, weight, labels, upstream_K, **options)
    plain = run(reference, hidden, weight, labels, upstream_K, **options)
    exact = run(
        reference, *(x.detach().double().requires_grad_() for x in (hidden, weight)), labels, upstream_K, **options
    )
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert a.dtype == b.dtype
        # the floor: a CPU's GEMM sums the last chunk's three rows in a less exact order than the plain path's seven
        assert error(a, c) <= max(1.5 * error(b, c), 6e-7)


def test_small_upstream_gradients_survive_fp16(device):
    """Folded into fp16 logit gradients, 1e-8 would leave nothing of them."""
    hidden, weight, labels = make(device, torch.float16)
    with torch.no_grad():
        hidden *= 2.0**12  # so that the head's gradient itself fits into fp16
        weight *= 2.0**-12
    upstream_K = torch.linspace(1, 2, 7, device=device) * 1e-8
    ours = run(linear_log_probs, hidden, weight, labels, upstream_K)
    exact = run(reference, *(x.detach().double().requires_grad_() for x in (hidden, weight)), labels, upstream_K)
    assert error(ours[2], exact[2]) < 5e-3


def test_zero_upstream_gradients_and_zero_rows_give_zeros(any_device):
    hidden, weight, labels = make(any_device, torch.float32)
    for grad in run(linear_log_probs, hidden, weight, labels, torch.zeros(7, device=any_device))[1:]:
        assert not grad.any()
    no_rows = torch.zeros(0, dtype=torch.int64, device=any_device)
    log_probs, *grads = run(linear_log_probs, hidden, weight, labels, torch.zeros(0, device=any_device), rows=no_rows)
    assert log_probs.shape == (0,)
    assert not any(grad.any() for grad in grads)


def test_gradcheck_in_fp64():
    hidden, weight, labels = make("cpu", torch.float64, H=5, V=11)
    torch.autograd.gradcheck(lambda hidden: linear_log_probs(hidden, weight.detach(), labels, softcap=5.0), (hidden,))


def test_op_is_registered_as_torch_library_wants_it(any_device):
    hidden, weight, labels = make(any_device, torch.float32, V=70)
    rows = (labels != -100).nonzero().squeeze(1)
    torch.library.opcheck(module._linear_log_probs_op, (hidden, weight, None, labels, rows, torch.float32, 1.0, None))
