"""Linears with LoRA (`ops/lora.py`), forward and backward, over bf16, NF4 and FP8 weights, and in plain PyTorch.

    python benchmarks/bench_lora.py --out benchmarks/results/lora.json

The blocks of a 0.6B and an 8B model on 16,384 tokens with rank 16: results, the gradient of x and those of all A and
B. `plain` is PEFT's arithmetic through autograd, with NF4 weights dequantized by bitsandbytes; `products` are the dense
weight's two products alone, in bf16. Results and gradients are checked against fp32 on fresh random inputs first: the
error is at most 1.5 times that of plain PyTorch, but with FP8, where it is printed. Times are medians of replayed CUDA
graphs, by turns.

Letters of tensor shapes: T tokens, K input features, N output features, R rank.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from bandwidth import error_of, graphs_ms, parse_arguments, write
from truetune.ops.fp8 import Fp8Weight, why_not_fp8
from truetune.ops.lora import (
    DenseWeight,
    Linear,
    Nf4Weight,
    QuantizedWeight,
    Weight,
    linears_backward_input,
    linears_backward_parameters,
    linears_forward,
    linears_reference,
)

T, RANK = 16384, 16
BLOCKS = [  # name, K, and N of each linear
    ("q, k, v", 1024, (2048, 1024, 1024)),
    ("o", 2048, (1024,)),
    ("gate, up", 1024, (3072, 3072)),
    ("down", 3072, (1024,)),
    ("8B q, k, v", 4096, (4096, 1024, 1024)),
    ("8B o", 4096, (4096,)),
    ("8B gate, up", 4096, (14336, 14336)),
    ("8B down", 14336, (4096,)),
]
FP8_ERROR = 0.05


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def nf4(weight_NK: torch.Tensor) -> Weight:
    from bitsandbytes.functional import quantize_4bit

    return Nf4Weight(*quantize_4bit(weight_NK, compress_statistics=True, quant_type="nf4"))


KINDS: dict[str, Callable[[torch.Tensor], Weight]] = {
    "bf16": DenseWeight,
    "nf4": nf4,
    "fp8": lambda weight_NK: QuantizedWeight(Fp8Weight.quantize(weight_NK)),
}


def measure(name: str, K: int, widths: tuple[int, ...], kind: str) -> dict:
    x_TK, dys = randn(T, K), [randn(T, N) for N in widths]
    dense = [randn(N, K, scale=K**-0.5) for N in widths]
    linears = [
        Linear(
            KINDS[kind](weight_NK),
            a_RK=torch.randn(RANK, K, device="cuda") * K**-0.5,
            b_NR=torch.randn(len(weight_NK), RANK, device="cuda") * 0.1,
        )
        for weight_NK in dense
    ]

    def ours() -> list[torch.Tensor | None]:
        with torch.no_grad():
            results, xa_TS = linears_forward(x_TK, linears)
            dx_TK, adapters = linears_backward_input(dys, xa_TS, linears)
            gradients = linears_backward_parameters(dys, x_TK, xa_TS, adapters, linears)
        return [*results, dx_TK, *(gradient for gradient in gradients if gradient is not None)]

    def by_autograd(dtype: torch.dtype) -> list[torch.Tensor]:
        x, leaves = x_TK.detach().to(dtype).requires_grad_(), []
        for linear in linears:
            leaves.append([m.detach().requires_grad_() for m in (linear.a_RK, linear.b_NR) if m is not None])
        copies = [replace(linear, a_RK=a, b_NR=b) for linear, (a, b) in zip(linears, leaves, strict=True)]
        results = linears_reference(x, copies)
        wanted = [x, *(leaf for pair in leaves for leaf in pair)]
        gradients = torch.autograd.grad(results, wanted, [dy.to(dtype) for dy in dys])
        return [*(result.detach() for result in results), *gradients]

    def products() -> list[torch.Tensor]:
        return [x_TK @ weight_NK.t() for weight_NK in dense] + [
            dy_TN @ weight_NK for dy_TN, weight_NK in zip(dys, dense, strict=True)
        ]

    worst = 0.0
    for our, plain, exact in zip(ours(), by_autograd(torch.bfloat16), by_autograd(torch.float32), strict=True):
        assert our is not None
        error, allowed = error_of(our, exact), FP8_ERROR if kind == "fp8" else 1.5 * error_of(plain, exact) + 1e-5
        assert error <= allowed, f"{name}, {kind}: error {error:.5f}, allowed {allowed:.5f}"
        worst = max(worst, error)
    ours_ms, plain_ms, products_ms = graphs_ms([ours, lambda: by_autograd(torch.bfloat16), products])
    print(
        f"| {name} | {kind} | {ours_ms:.3f} | {products_ms:.3f} | {plain_ms:.3f} | {plain_ms / ours_ms:.2f}x "
        f"| {worst:.5f} |",
        flush=True,
    )
    return {
        "block": name, "weights": kind, "ours_ms": ours_ms, "products_ms": products_ms, "plain_ms": plain_ms,
        "plain_over_ours": plain_ms / ours_ms, "error": worst,
    }  # fmt: skip


def main() -> None:
    arguments = parse_arguments(__doc__)
    kinds = [kind for kind in KINDS if kind != "fp8" or why_not_fp8("cuda") is None]
    print("| block | weights | ours ms | products ms | plain ms | | error |\n|---|---|---|---|---|---|---|")
    write(arguments.out, [measure(*block, kind) for kind in kinds for block in BLOCKS])


if __name__ == "__main__":
    main()
