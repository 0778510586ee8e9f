"""LoRA's small products (`ops/low_rank.py`) beside cuBLAS's.

    python benchmarks/bench_low_rank.py --out benchmarks/results/low_rank.json

16,384 tokens. A gradient's two products, dy [T, N] with B [N, R] and x @ A.T [T, R], in one pass over dy and as two
GEMMs; x @ A.T; the gradient of A, of x as it is and of a stream that is normed on the way (beside a norm and a GEMM);
and the gradients of A and of all B of linears that share their input, in one launch. `read` is the large operands'
bytes at the speed of a copy. All are checked against fp32 on fresh random inputs first. Times are medians of replayed
CUDA graphs, by turns.

Letters of tensor shapes: T tokens, K input features, N output features, R rank, S the sum of several ranks.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch

from bandwidth import copy_ms, error_of, graphs_ms, parse_arguments, write
from truetune.ops import low_rank
from truetune.ops.low_rank import NormedRows, low_rank_backward, matmul_fp32, outer, outers, project
from truetune.ops.rms_norm import rms_norm_forward

T = 16384
GRADIENTS = [(14336, 16), (14336, 32), (4096, 16), (4096, 32), (3072, 16), (2048, 16), (1024, 16)]  # N, R
SMALL = [(1024, 48), (1024, 32), (2048, 16), (3072, 16), (4096, 48), (14336, 16)]  # K, S
BLOCKS = [  # K, and N of each linear, of 16 ranks
    ("q, k, v", 1024, (2048, 1024, 1024)),
    ("o", 2048, (1024,)),
    ("down", 3072, (1024,)),
    ("8B q, k, v", 4096, (4096, 1024, 1024)),
    ("8B o", 4096, (4096,)),
    ("8B down", 14336, (4096,)),
]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def compared(what: str, width: int, ranks: int, ours: Callable, theirs: Callable, exact: tuple) -> dict:
    """Both give tuples of tensors, as `exact` is."""
    for our, their, expected in zip(ours(), theirs(), exact, strict=True):
        errors = [error_of(value, expected) for value in (our, their)]
        assert errors[0] <= 1.5 * errors[1] + 1e-5, f"{what}, {width} x {ranks}: error {errors[0]:.6f}, {errors[1]:.6f}"
    ours_ms, theirs_ms = graphs_ms([ours, theirs])
    read_ms = copy_ms(2 * T * width)
    times = f"{ours_ms:.3f} | {theirs_ms:.3f} | {theirs_ms / ours_ms:.2f}x | {read_ms:.3f}"
    print(f"| {what} | {width} | {ranks} | {times} |", flush=True)
    return {
        "what": what, "width": width, "ranks": ranks, "ours_ms": ours_ms, "cublas_ms": theirs_ms,
        "cublas_over_ours": theirs_ms / ours_ms, "read_ms": read_ms,
    }  # fmt: skip


def gradients(N: int, R: int) -> dict:
    dy_TN, b_NR = randn(T, N), torch.randn(N, R, device="cuda")
    x_TR = randn(T, 3 * R)[:, R : 2 * R]  # one of q, k and v
    exact = dy_TN.float() @ b_NR.bfloat16().float(), dy_TN.float().t() @ x_TR.float()

    def one_pass() -> tuple[torch.Tensor, torch.Tensor]:
        with patch.object(low_rank, "_one_pass_pays", lambda *_: True):
            return low_rank_backward(dy_TN, b_NR, x_TR)

    def two() -> tuple[torch.Tensor, torch.Tensor]:
        return dy_TN @ b_NR.to(dy_TN.dtype), matmul_fp32(dy_TN.t(), x_TR)

    return compared("gradient, in one pass", N, R, one_pass, two, exact)


def small(K: int, S: int) -> list[dict]:
    x_TK, a_SK, d_TS, weight_K = randn(T, K), randn(S, K), randn(T, S), randn(K)
    done = rms_norm_forward(x_TK, weight_K, 1e-6)
    normed = NormedRows(x_TK, done.rstd_T, weight_K, 0.0, lambda _: done.y)

    def norm_and_gemm() -> tuple[torch.Tensor]:
        return (matmul_fp32(d_TS.t(), rms_norm_forward(x_TK, weight_K, 1e-6).y),)

    def of(product: Callable[[], torch.Tensor]) -> Callable[[], tuple[torch.Tensor]]:
        return lambda: (product(),)

    through_a, plain = x_TK.float() @ a_SK.float().t(), d_TS.float().t() @ x_TK.float()
    return [
        compared("x @ A.T", K, S, of(lambda: project(x_TK, a_SK)), of(lambda: x_TK @ a_SK.t()), (through_a,)),
        compared("of A", K, S, of(lambda: outer(d_TS, x_TK)), of(lambda: matmul_fp32(d_TS.t(), x_TK)), (plain,)),
        compared(
            "of A, normed", K, S, of(lambda: outer(d_TS, normed)), norm_and_gemm, (d_TS.float().t() @ done.y.float(),)
        ),
    ]


def block(name: str, K: int, widths: tuple[int, ...]) -> dict:
    ranks = 16 * len(widths)
    x_TK, d_TS, xa_TS = randn(T, K), randn(T, ranks), randn(T, ranks)
    pairs = [(xa_TS[:, 16 * i : 16 * i + 16], randn(T, N)) for i, N in enumerate(widths)]

    def in_one_launch() -> tuple[torch.Tensor, ...]:
        return tuple(outers(d_TS, x_TK, pairs))

    def one_by_one() -> tuple[torch.Tensor, ...]:
        return matmul_fp32(d_TS.t(), x_TK), *(matmul_fp32(dy_TN.t(), xa_TR) for xa_TR, dy_TN in pairs)

    exact = d_TS.float().t() @ x_TK.float(), *(dy_TN.float().t() @ xa_TR.float() for xa_TR, dy_TN in pairs)
    return compared(f"of A and B of {name}", K + sum(widths), ranks, in_one_launch, one_by_one, exact)


def main() -> None:
    arguments = parse_arguments(__doc__)
    print("| product | width | ranks | ours ms | cuBLAS ms | | read ms |\n|---|---|---|---|---|---|---|")
    results = [gradients(N, R) for N, R in GRADIENTS]
    for K, S in SMALL:
        results += small(K, S)
    results += [block(*case) for case in BLOCKS]
    write(arguments.out, results)


if __name__ == "__main__":
    main()
