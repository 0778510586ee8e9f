"""A bf16 linear with its adapter and residual in one launch (`ops/dense_sum.py`), and as cuBLAS's products with a pass.

    python benchmarks/bench_dense_sum.py --out benchmarks/results/dense_sum.json

The sums of a step with 16,384 tokens and LoRA of rank 16, of a 0.6B and an 8B model. `products` is cuBLAS alone,
without any sum; `passes` is what devices other than Hopper do. Each is checked against fp32 on fresh random inputs
first; `error` is relative to it. Times are medians of replayed CUDA graphs, by turns: a launch takes the host longer
than the device.

Letters of tensor shapes: T tokens, K what a product sums over, N output features, R rank.
"""

import sys
from unittest.mock import patch

import torch

from bandwidth import error_of, graphs_ms, parse_arguments, write
from truetune.ops import lora
from truetune.ops.lora import AdapterGradients, DenseWeight, Linear, linears_backward_input

T = 16384
FORWARD = [  # name, K, N, whether there is a residual
    ("q", 1024, 2048, False),
    ("k, v", 1024, 1024, False),
    ("o", 2048, 1024, True),
    ("gate, up", 1024, 3072, False),
    ("down", 3072, 1024, True),
    ("8B q", 4096, 4096, False),
    ("8B gate, up", 4096, 14336, False),
    ("8B down", 14336, 4096, True),
]
BACKWARD = [  # name, K, the widths of what shares it
    ("gradient through o", 2048, (1024,)),
    ("gradient through down", 3072, (1024,)),
    ("gradient through q, k and v", 1024, (2048, 1024, 1024)),
    ("gradient through gate and up", 1024, (3072, 3072)),
    ("8B gradient through down", 14336, (4096,)),
    ("8B gradient through q, k and v", 4096, (4096, 1024, 1024)),
    ("8B gradient through gate and up", 4096, (14336, 14336)),
]
RANK = 16


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def measured(name: str, one, products, exact: torch.Tensor) -> dict:
    def passes() -> torch.Tensor:
        with patch.object(lora, "sums_in_one_launch", lambda *_: False):
            return one()

    errors = error_of(one(), exact), error_of(passes(), exact)
    assert errors[0] <= 1.05 * errors[1], f"{name}: error {errors[0]:.5f}, with passes {errors[1]:.5f}"
    one_ms, passes_ms, products_ms = graphs_ms([one, passes, products])
    print(
        f"| {name} | {one_ms:.3f} | {products_ms:.3f} | {passes_ms:.3f} | {passes_ms / one_ms:.2f}x "
        f"| {errors[0]:.5f}, {errors[1]:.5f} |",
        flush=True,
    )
    return {
        "case": name, "one_ms": one_ms, "products_ms": products_ms, "passes_ms": passes_ms,
        "passes_over_one": passes_ms / one_ms, "error": errors[0], "passes_error": errors[1],
    }  # fmt: skip


def forward(name: str, K: int, N: int, residual: bool) -> dict:
    x_TK, weight, b_NR, xa_TR = (
        randn(T, K),
        DenseWeight(randn(N, K, scale=K**-0.5)),
        randn(N, RANK, scale=0.1),
        randn(T, RANK),
    )
    stream_TN = randn(T, N) if residual else None
    exact = x_TK.float() @ weight.weight_NK.float().t() + xa_TR.float() @ b_NR.float().t()
    if stream_TN is not None:
        exact += stream_TN.float()
    return measured(
        name, lambda: weight.times(x_TK, None, (xa_TR, b_NR), stream_TN), lambda: x_TK @ weight.weight_NK.t(), exact
    )


def backward(name: str, K: int, widths: tuple[int, ...]) -> dict:
    dys = [randn(T, N) for N in widths]
    linears = [
        Linear(DenseWeight(randn(N, K, scale=N**-0.5)), a_RK=randn(RANK, K, scale=0.1), b_NR=randn(N, RANK))
        for N in widths
    ]
    dxa_TS = randn(T, RANK * len(widths))
    exact = dxa_TS.float() @ torch.cat([linear.a_RK for linear in linears]).float()
    for dy_TN, linear in zip(dys, linears, strict=True):
        exact += dy_TN.float() @ linear.weight.weight_NK.float()

    def one() -> torch.Tensor:
        with patch.object(lora, "_through_b", lambda *_: AdapterGradients(dxa_TS, [])):
            return linears_backward_input(dys, None, linears)[0]

    def products() -> list[torch.Tensor]:
        return [dy_TN @ linear.weight.weight_NK for dy_TN, linear in zip(dys, linears, strict=True)]

    return measured(name, one, products, exact)


def main() -> None:
    arguments = parse_arguments(__doc__)
    if torch.cuda.get_device_capability() != (9, 0):
        sys.exit(
            "benchmarks/bench_dense_sum.py needs a Hopper GPU: elsewhere the library has no kernel for these sums."
        )
    print("| sum | one launch ms | products ms | with passes ms | | error, with passes |\n|---|---|---|---|---|---|")
    write(arguments.out, [forward(*case) for case in FORWARD] + [backward(*case) for case in BACKWARD])


if __name__ == "__main__":
    main()
