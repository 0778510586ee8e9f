import pytest
import torch

from truetune.ops.rows import add_rows_, put_rows, scale_rows, scale_rows_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(3, 72), (70, 129), (2, 5000), (0, 8), (3, 0)]  # K, H; of 2 * K rows


def pick(K: int, device: str) -> torch.Tensor:
    """K different rows of 2 * K in any order, and not next to each other in memory, as `nonzero()[:, 0]` gives them."""
    return torch.randperm(2 * K, device=device)[:K, None].repeat(1, 2)[:, 0]


def strided(K: int, H: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(K, H + 3, device=device).to(dtype)[:, 1 : H + 1]


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "H"), SIZES)
def test_rows_are_scaled_in_fp32_and_rounded_once(device, in_dtype, out_dtype, K, H):
    x = strided(K, H, in_dtype, device)
    scale = torch.tensor(1 / 3, device=device)
    expected = (x.float() * (1 / 3)).to(out_dtype)
    assert torch.equal(scale_rows(x, scale, None, K, out_dtype), expected)

    rows = pick(K, device)
    scattered = scale_rows(x, scale, rows, 2 * K, out_dtype)
    assert torch.equal(scattered[rows], expected)
    assert scattered.count_nonzero() == expected.count_nonzero()
    assert torch.equal(scattered, scale_rows_reference(x, scale, rows, 2 * K, out_dtype))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "H"), SIZES)
def test_rows_are_put_where_the_gradient_of_index_select_is(device, dtype, K, H):
    rows = pick(K, device)
    dout = torch.randn(H, K, device=device).to(dtype).T  # elements of a row far apart
    x = torch.zeros(2 * K, H, dtype=dtype, device=device, requires_grad=True)
    for gradient in (dout, dout[:, :1].expand(-1, H) if H else dout):
        (exact,) = torch.autograd.grad(x.index_select(0, rows), x, gradient)
        ours = put_rows(gradient, rows, 2 * K)
        assert ours.dtype == dtype
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "H"), SIZES)
def test_rows_are_put_and_the_others_are_zero(device, dtype, K, H):
    x, rows = strided(K, H, dtype, device), pick(K, device)
    out = put_rows(x, rows, 2 * K)
    assert out.shape == (2 * K, H)
    assert out.dtype == dtype
    assert torch.equal(out[rows], x)
    assert out.count_nonzero() == x.count_nonzero()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(("K", "H"), SIZES)
def test_rows_are_added_in_place_and_rounded_once(device, dtype, K, H):
    x, rows = strided(K, H, dtype, device), pick(K, device)
    whole = torch.randn(2 * K, H + 3, device=device).to(dtype)
    expected = whole.clone()
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    expected[rows, 1 : H + 1] = (whole[rows, 1 : H + 1].to(precise) + x.to(precise)).to(dtype)
    out = whole[:, 1 : H + 1]
    assert add_rows_(out, x, rows) is out
    assert torch.equal(whole, expected)  # also beside out's columns


def test_rows_beyond_two_billion_elements_are_found(device):
    whole = torch.empty(2**31 + 40, dtype=torch.float16, device=device)  # 4 GiB of addresses; few are touched
    out, rows = whole.as_strided((3, 40), (2**30, 1)).fill_(1), torch.tensor([2, 1], device=device)
    x = torch.arange(80.0, device=device).half().view(2, 40)
    add_rows_(out, x, rows)
    assert torch.equal(out, torch.ones_like(out).index_add(0, rows, x))


def test_what_does_not_fit_together_is_refused(any_device):
    out, x = torch.zeros(4, 6, device=any_device), torch.ones(2, 6, device=any_device)
    rows = torch.tensor([2, 0], device=any_device)
    for bad in (rows[:1], rows[None]):
        with pytest.raises(ValueError, match="x has 2 rows"):
            add_rows_(out, x, bad)
        with pytest.raises(ValueError, match="x has 2 rows"):
            put_rows(x, bad, 4)
    for bad in (x.half(), x[:, :5]):
        with pytest.raises(ValueError, match="one dtype and length"):
            add_rows_(out, bad, rows)
    with pytest.raises(ValueError, match="last dimension"):
        add_rows_(torch.zeros(6, 4, device=any_device).T, x, rows)
    assert not out.any()


def test_op_is_registered_as_torch_library_wants_it(any_device):
    x, scale = torch.randn(3, 5, device=any_device), torch.tensor(2.0, device=any_device)
    torch.library.opcheck(scale_rows, (x, scale, torch.tensor([4, 0, 2], device=any_device), 6, torch.bfloat16))
    torch.library.opcheck(scale_rows, (x, scale, None, 3, torch.float32))
