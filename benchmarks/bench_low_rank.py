"""The two products of a gradient with a low-rank pair (`low_rank_backward`): in one pass over it, and as two GEMMs.

    python benchmarks/bench_low_rank.py --out benchmarks/results/low_rank.json

dy [T, N] with B [N, R] and x @ A.T [T, R], 16,384 tokens. `read` is dy's bytes at the speed of a copy. Both are checked
against fp32 on fresh random inputs first. Times are medians of `triton.testing.do_bench`.
"""

import torch

from bandwidth import copy_ms, parse_arguments, write
from truetune.ops.low_rank import low_rank_backward, matmul_fp32

T = 16384
CASES = [(14336, 16), (14336, 32), (9728, 16), (4096, 16), (4096, 32), (3072, 16), (2048, 16)]  # N, R


def error_of(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def measure(N: int, R: int) -> dict:
    from triton.testing import do_bench

    dy_TN = torch.randn(T, N, device="cuda", dtype=torch.bfloat16)
    b_NR = torch.randn(N, R, device="cuda")
    x_TR = torch.randn(T, 3 * R, device="cuda", dtype=torch.bfloat16)[:, R : 2 * R]  # one of q, k and v

    def two() -> tuple[torch.Tensor, torch.Tensor]:
        return dy_TN @ b_NR.to(dy_TN.dtype), matmul_fp32(dy_TN.t(), x_TR)

    exact = dy_TN.float() @ b_NR.bfloat16().float(), dy_TN.float().t() @ x_TR.float()
    for ours, theirs, expected in zip(low_rank_backward(dy_TN, b_NR, x_TR), two(), exact, strict=True):
        errors = error_of(ours, expected), error_of(theirs, expected)
        assert errors[0] <= 1.5 * errors[1] + 1e-5, f"{N} x {R}: error {errors[0]:.6f}, two GEMMs {errors[1]:.6f}"
    one_ms = do_bench(lambda: low_rank_backward(dy_TN, b_NR, x_TR), return_mode="median")
    two_ms = do_bench(two, return_mode="median")
    read_ms = copy_ms(2 * T * N)
    print(f"| {N} | {R} | {one_ms:.3f} | {two_ms:.3f} | {two_ms / one_ms:.2f}x | {read_ms:.3f} |", flush=True)
    return {"n": N, "rank": R, "one_ms": one_ms, "two_ms": two_ms, "two_over_one": two_ms / one_ms, "read_ms": read_ms}


def main() -> None:
    arguments = parse_arguments(__doc__)
    print("| N | rank | one pass ms | two GEMMs ms | | read ms |\n|---|---|---|---|---|---|")
    write(arguments.out, [measure(N, R) for N, R in CASES])


if __name__ == "__main__":
    main()
