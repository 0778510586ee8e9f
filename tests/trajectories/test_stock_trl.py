"""What stands for TRL 1.15's kernels on a CPU computes what they compute."""

import os
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

if Version(version("trl")) >= Version("1.16"):
    pytest.skip("TRL 1.16 runs on a CPU by itself", allow_module_level=True)

from trl.kernels import ChunkedLogProbFunction

from stock_trl import log_probs_entropy_top1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "softcap", "logit_scale"), [(1.0, None, 1.0), (0.7, 3.0, 0.5)])
def test_the_plain_head_is_trls(bias, temperature, softcap, logit_scale):
    device = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(7, 12, device=device), torch.randn(1300, 12, device=device)
    bias_V = torch.randn(1300, device=device) if bias else None
    targets_N = torch.randint(0, 1300, (7,), device=device)
    targets_N[:3] = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)[:3].argmax(-1)
    leaves = [x for x in (hidden_NH, weight_VH, bias_V) if x is not None]
    results = []
    for head in (ChunkedLogProbFunction.apply, log_probs_entropy_top1):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        outputs = ("log_probs", "entropy", "is_top1")
        settings = (temperature, 1024, softcap, logit_scale, outputs)
        log_probs, entropy, _, _, is_top1 = head(hidden_NH, weight_VH, bias_V, targets_N, *settings)
        (log_probs.sum() - 0.3 * entropy.sum()).backward()
        results.append([log_probs, entropy, is_top1.float(), *(leaf.grad for leaf in leaves)])
    assert results[0][2].sum() >= 3 and not results[0][2].all()
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
