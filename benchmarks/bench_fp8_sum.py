"""Sums of FP8 products in one kernel (`ops/fp8_sum.py`), and as cuBLASLt's products with a pass over their results.

    python benchmarks/bench_fp8_sum.py --out benchmarks/results/fp8_sum.json

The sums of an 8B model's step with 16,384 tokens and LoRA of rank 16 (and 64). `products` is cuBLASLt alone, without
any sum; `passes` is what devices other than Hopper do. Each is checked against fp32 on fresh random inputs first;
`error` is relative to it. Times are medians of `triton.testing.do_bench`.

Letters of tensor shapes: T tokens, K what a product sums over, N output features, R rank.
"""

import sys
from unittest.mock import patch

import torch

from bandwidth import error_of, parse_arguments, write
from truetune.ops import fp8_sum as module
from truetune.ops.fp8 import Fp8Product, quantize_rows, scaled_product
from truetune.ops.fp8_sum import fp8_sum

T = 16384
CASES = [  # name, widths K, N, rank, whether there is a residual
    ("q", (4096,), 4096, 16, False),
    ("k, v", (4096,), 1024, 16, False),
    ("o", (4096,), 4096, 16, True),
    ("gate, up", (4096,), 14336, 16, False),
    ("gate, up of rank 64", (4096,), 14336, 64, False),
    ("down", (14336,), 4096, 16, True),
    ("gradient through down", (4096,), 14336, 16, False),
    ("gradient through gate and up", (14336, 14336), 4096, 32, False),
    ("gradient through q, k and v", (4096, 1024, 1024), 4096, 48, False),
]


def measure(name: str, widths: tuple[int, ...], N: int, rank: int, residual: bool) -> dict:
    from triton.testing import do_bench

    products, exact = [], torch.zeros(T, N, device="cuda")
    for K in widths:
        a8_TK, scale_T = quantize_rows(torch.randn(T, K, device="cuda", dtype=torch.bfloat16))
        b8_NK, scale_N = quantize_rows((torch.randn(N, K, device="cuda") * K**-0.5).bfloat16())
        products.append(Fp8Product(a8_TK, scale_T, b8_NK, scale_N[None, :]))
        exact += (a8_TK.float() * scale_T[:, None]) @ (b8_NK.float() * scale_N[:, None]).t()
    x_TR = torch.randn(T, rank, device="cuda", dtype=torch.bfloat16)
    b_NR = (torch.randn(N, rank, device="cuda") * 0.1).bfloat16()
    exact += x_TR.float() @ b_NR.float().t()
    stream_TN = torch.randn(T, N, device="cuda", dtype=torch.bfloat16) if residual else None
    if stream_TN is not None:
        exact += stream_TN.float()

    def one() -> torch.Tensor:
        return fp8_sum(products, low_rank=(x_TR, b_NR), add_TN=stream_TN)

    def passes() -> torch.Tensor:
        with patch.object(module, "_fits_kernel", lambda *_: False):
            return one()

    errors = error_of(one(), exact), error_of(passes(), exact)
    assert errors[0] <= 1.5 * errors[1], f"{name}: error {errors[0]:.5f}, with passes {errors[1]:.5f}"
    steps = (one, passes, lambda: [scaled_product(product) for product in products])
    one_ms, passes_ms, products_ms = (do_bench(step, rep=300, return_mode="median") for step in steps)
    print(
        f"| {name} | {one_ms:.3f} | {products_ms:.3f} | {passes_ms:.3f} | {passes_ms / one_ms:.2f}x "
        f"| {errors[0]:.5f}, {errors[1]:.5f} |",
        flush=True,
    )
    return {
        "case": name, "widths": widths, "n": N, "rank": rank, "one_ms": one_ms, "products_ms": products_ms,
        "passes_ms": passes_ms, "passes_over_one": passes_ms / one_ms, "error": errors[0], "passes_error": errors[1],
    }  # fmt: skip


def main() -> None:
    arguments = parse_arguments(__doc__)
    if torch.cuda.get_device_capability() != (9, 0):
        sys.exit("benchmarks/bench_fp8_sum.py needs a Hopper GPU: elsewhere the library has no kernel for these sums.")
    print("| sum | one kernel ms | products ms | with passes ms | | error, with passes |\n|---|---|---|---|---|---|")
    write(arguments.out, [measure(*case) for case in CASES])


if __name__ == "__main__":
    main()
