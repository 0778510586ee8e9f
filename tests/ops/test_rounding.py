"""Matrices that are rounded together are what PyTorch makes of each."""

import pytest
import torch

from truetune.ops.rounding import rounded

SHAPES = [(16, 1024), (3, 5), (1024, 16), (7, 200), (1, 1), (130, 9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4, 6, 7])
def test_each_is_what_pytorch_gives(device, dtype, given, count):
    torch.manual_seed(count)
    matrices = [torch.randn(shape, device=device).to(given) for shape in (SHAPES * 2)[:count]]
    factors = [1.0, 0.3, 2.0, 1.0, 1.7, 1.0, 0.1][:count]
    expected = [(x.float() * factor).to(dtype) for x, factor in zip(matrices, factors, strict=True)]
    assert torch.equal(rounded(matrices, factors, dtype), torch.cat([x.flatten() for x in expected]))


def test_rows_may_lie_anywhere(device):
    matrices = [torch.randn(6, 4, device=device).t(), torch.randn(5, 8, device=device)[::2, 1:4]]
    assert torch.equal(
        rounded(matrices, [1.0, 1.0], torch.bfloat16), torch.cat([x.bfloat16().flatten() for x in matrices])
    )


def test_fp64_stays_exact(device):
    matrix = torch.randn(3, 3, device=device, dtype=torch.float64)
    assert torch.equal(rounded([matrix], [1 / 3], torch.float64), matrix.flatten() * (1 / 3))
