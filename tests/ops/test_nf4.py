"""4-bit weights are made dense as bitsandbytes makes them, whatever their scales and widths."""

import pytest
import torch

from truetune.ops.nf4 import dequantize_nf4, dequantize_nf4_reference

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(33, 64), (70, 128), (512, 192)], ids=str)  # less than a program's, and several
def test_the_weight_is_that_of_bitsandbytes(device, nested, shape):
    torch.manual_seed(0)
    weight_NK = torch.randn(shape, device=device)
    packed, state = functional.quantize_4bit(weight_NK, quant_type="nf4", compress_statistics=nested)
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = (make(packed, state, dtype) for make in (dequantize_nf4, dequantize_nf4_reference))
        assert ours.dtype == dtype and ours.shape == weight_NK.shape
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", ["kernels"], indirect=True)
def test_blocks_go_on_from_row_to_row(device):
    """bitsandbytes 0.50 begins them anew on a CPU, and is off by a quarter where 64 does not divide the width."""
    torch.manual_seed(0)
    weight_NK = torch.randn(66, 96, device=device)
    packed, state = functional.quantize_4bit(weight_NK, quant_type="nf4")
    assert (dequantize_nf4(packed, state, torch.float32) - weight_NK).norm() < 0.1 * weight_NK.norm()
