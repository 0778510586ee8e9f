"""The loss of a frozen head in one pass: rows of every kind against fp64, and against the kernel of two passes."""

import numpy as np
import pytest
import torch

from truetune.ops import backend, cross_entropy

LOSS = cross_entropy.Loss(1.0, None, 0.0, False)


@pytest.fixture(autouse=True)
def kernels_only(device):
    if device == "cpu" and not backend.FORCE_KERNELS:
        pytest.skip("a kernel's test")


def padded(logits_CV, dtype, device):
    """The logits in rows of a multiple of 64, -inf behind them, as the head hands them over."""
    C, V = logits_CV.shape
    memory = torch.full((C, -(-V // 64) * 64), -torch.inf, dtype=dtype, device=device)
    memory[:, :V] = logits_CV
    return memory[:, :V]


def rows_of(targets, weights=None, stats=True):
    C, device = len(targets), targets.device
    loss, nll, entropy = torch.full((3, C), torch.nan, device=device)
    top1 = torch.zeros(C, dtype=torch.bool, device=device)
    return cross_entropy.Rows(
        targets, weights, loss, nll, entropy if stats else entropy[:0], top1 if stats else top1[:0]
    )


def exact_of(logits_CV, targets, scale=1.0):
    """nll, entropy, and the gradient to the scaled logits, fp64."""
    log_probs = (logits_CV.double() * scale).log_softmax(-1)
    probs = log_probs.exp()
    entropy = torch.special.entr(probs).sum(-1)
    gradient = probs - torch.nn.functional.one_hot(targets, logits_CV.shape[1])
    return -log_probs.gather(1, targets[:, None]).squeeze(1), entropy, gradient


def logits_of_every_kind(V):
    """Usual rows, sure and wrong ones, and rows whose logits lie up to thousands of nats above their target's."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(9, V, generator=rng) * 2
    targets = torch.randint(0, V, (9,), generator=rng)
    at = torch.arange(9)
    logits[1, targets[1]] = 30.0  # sure and right
    logits[2, targets[2]] = -30.0  # wrong, within what one pass holds
    logits[3] *= 30  # far apart, here and there
    logits[4, targets[4]] = -3000.0
    logits[5, V - 1] = 90.0  # only its last tile is too high
    logits[6] += torch.linspace(0, 400, V)  # the reference moves again and again
    logits[7, ::3] = -torch.inf  # a masked vocabulary
    logits[8] += 500.0
    targets[7] = 1
    assert (targets[at] < V).all()
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("V", [70, 3001])
def test_rows_of_every_kind(device, dtype, scale, V):
    logits, targets = logits_of_every_kind(V)
    logits_CV = padded(logits.to(dtype), dtype, device)
    rows = rows_of(targets.to(device))
    nll, entropy, gradient = exact_of(logits.to(dtype), targets, scale)
    with np.errstate(all="ignore"):
        factor_C = cross_entropy.cross_entropy_in_one_pass(logits_CV, rows, LOSS._replace(logit_scale=scale))
    torch.testing.assert_close(rows.nll.cpu().double(), nll, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(rows.entropy.cpu().double(), entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(rows.loss, rows.nll)
    assert rows.is_top1.tolist() == (logits.to(dtype).argmax(-1) == targets).tolist()
    found = logits_CV.cpu().double() * factor_C.cpu().double()[:, None]
    place = 2.0**-7 if dtype == torch.bfloat16 else 3e-6  # two roundings where a second pass was needed
    torch.testing.assert_close(found, gradient, rtol=place, atol=1e-7)
    memory = logits_CV.as_strided((len(logits), logits_CV.stride(0)), (logits_CV.stride(0), 1))
    assert not memory[:, V:].any()


def test_what_few_others_leave_of_a_sure_row_is_not_cancelled(device):
    """p - 1 of a probability that rounds to 1."""
    logits = torch.full((1, 200), -30.0)
    logits[0, 7], logits[0, 8] = 0.0, -12.0
    logits_CV = padded(logits, torch.bfloat16, device)
    targets = torch.tensor([7])
    factor_C = cross_entropy.cross_entropy_in_one_pass(logits_CV, rows_of(targets.to(device)), LOSS)
    gradient = exact_of(logits, targets)[2]
    found = logits_CV.cpu().double() * factor_C.cpu().double()[:, None]
    torch.testing.assert_close(found[0, 7:9], gradient[0, 7:9], rtol=0.02, atol=0)


@pytest.mark.parametrize("dft", [True, False])
def test_weights_and_dft_are_in_the_factor(device, dft):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(5, device=device)
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5, 1e-6], device=device)
    results = []
    for one_pass in (True, False):
        logits_CV = padded(logits, torch.float32, device)
        rows = rows_of(targets, weights, stats=False)
        if one_pass:
            factor_C = cross_entropy.cross_entropy_in_one_pass(logits_CV, rows, LOSS._replace(dft=dft))
            logits_CV *= factor_C[:, None]
        else:
            cross_entropy.cross_entropy_chunk(logits_CV, None, rows, LOSS._replace(dft=dft), write_grad=True)
        results.append((rows.loss, rows.nll, logits_CV))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["before", "after", "both", "alone"])
@pytest.mark.parametrize("target", [0, 63, 64, 599, 600, 1999])
def test_top1_is_the_first_of_equal_maxima(device, where, target):
    """Beside maxima that are near enough to round to the same exp(z - z_target)."""
    V, z = 2000, 0.15625
    logits = torch.full((1, V), -1.0)
    near = torch.nextafter(torch.tensor(z, dtype=torch.bfloat16), torch.tensor(0, dtype=torch.bfloat16)).float()
    logits[0, :: V // 50] = near
    if where in ("before", "both"):
        logits[0, max(0, target - 1)] = z
    if where in ("after", "both"):
        logits[0, min(V - 1, target + 1)] = z
    logits[0, target] = z
    rows = rows_of(torch.tensor([target], device=device))
    cross_entropy.cross_entropy_in_one_pass(padded(logits, torch.bfloat16, device), rows, LOSS)
    assert rows.is_top1.item() == (logits.argmax(-1).item() == target)


@pytest.mark.parametrize("target", [-1, 300, 10**9])
def test_label_outside_the_vocabulary_makes_the_loss_nan(device, target):
    logits_CV = padded(torch.zeros(2, 300), torch.bfloat16, device)
    rows = rows_of(torch.tensor([target, 5], device=device))
    cross_entropy.cross_entropy_in_one_pass(logits_CV, rows, LOSS)
    assert rows.loss.isnan().tolist() == [True, False]
