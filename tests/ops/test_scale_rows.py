import pytest
import torch

from truetune.ops.scale_rows import scale_rows, scale_rows_reference


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "H"), [(3, 72), (70, 129)])
def test_rows_are_scaled_in_fp32_and_rounded_once(device, in_dtype, out_dtype, K, H):
    x = torch.randn(K, H, device=device).to(in_dtype)
    scale = torch.tensor(1 / 3, device=device)
    expected = (x.float() * (1 / 3)).to(out_dtype)
    assert torch.equal(scale_rows(x, scale, None, K, out_dtype), expected)

    rows = torch.randperm(2 * K, device=device)[:K]
    scattered = scale_rows(x, scale, rows, 2 * K, out_dtype)
    assert torch.equal(scattered[rows], expected)
    assert scattered.count_nonzero() == expected.count_nonzero()
    assert torch.equal(scattered, scale_rows_reference(x, scale, rows, 2 * K, out_dtype))


def test_op_is_registered_as_torch_library_wants_it(any_device):
    x, scale = torch.randn(3, 5, device=any_device), torch.tensor(2.0, device=any_device)
    torch.library.opcheck(scale_rows, (x, scale, torch.tensor([4, 0, 2], device=any_device), 6, torch.bfloat16))
    torch.library.opcheck(scale_rows, (x, scale, None, 3, torch.float32))
