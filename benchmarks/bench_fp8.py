"""FP8 linears on one GPU against bf16, at the shapes of an 8B model and 16,384 tokens.

    python benchmarks/bench_fp8.py --out benchmarks/results/fp8.json

`GEMM` is the product alone, `with rows` quantizes the activations (or the gradient) first. TFLOP/s count 2 T K N.
`exact` is the product without `use_fast_accum`, which the library sets: with it the tensor cores keep sums in fewer
bits. Before anything is timed, the rows, both products and their error are checked on fresh random inputs: `error` is
relative to fp32, `rounding` what E4M3 rows alone cost in fp32 products. The second table is `quantize_rows` by itself,
against a plain copy of as many bytes. Times are medians of `triton.testing.do_bench`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from truetune.ops.fp8 import (
    Fp8Weight,
    quantize_rows,
    quantize_rows_reference,
    scaled_product,
    why_not_fp8,
)

T = 16384
SHAPES = [(4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)]  # K, N
ROW_LENGTHS = (14336, 4096, 3072)


def median_ms(step):
    from triton.testing import do_bench

    return do_bench(step, warmup=50, rep=300, return_mode="median")


def dequantize(x8, scale):
    return x8.float() * scale[:, None]


def check_rows(x):
    x8, scale = quantize_rows(x)
    expected8, expected_scale = quantize_rows_reference(x)
    assert torch.equal(scale, expected_scale), "scales are not those of plain PyTorch"
    assert torch.equal(x8.view(torch.uint8), expected8.view(torch.uint8)), "rows are not rounded as in plain PyTorch"


def errors(value, x, weight_NK):
    """Relative to fp32: of `value`, and of fp32 products of rows rounded to E4M3."""
    exact = x.float() @ weight_NK.float().t()
    weight8, scale = quantize_rows_reference(weight_NK, powers_of_two=True)
    rounded = dequantize(*quantize_rows_reference(x)) @ dequantize(weight8, scale).t()
    return [((y.float() - exact).norm() / exact.norm()).item() for y in (value, rounded)]


def measure(K, N):
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(N, K, device="cuda") * K**-0.5).bfloat16()
    dy = torch.randn(T, N, device="cuda", dtype=torch.bfloat16)
    held = Fp8Weight.quantize(weight)
    x8, x_scale = quantize_rows(x)
    dy8, dy_scale = quantize_rows(dy)
    check_rows(x)
    check_rows(weight.t().contiguous())

    def exact(a8, scale_a, b8, scale_b):
        return torch._scaled_mm(
            a8, b8.t(), scale_a=scale_a[:, None], scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=False
        )

    rows = []
    for direction, a, b, times, product in (
        ("forward", x, weight.t(), held.times, held.times(x8, x_scale)),
        ("backward", dy, weight, held.transposed_times, held.transposed_times(dy8, dy_scale)),
    ):
        error, rounding = errors(scaled_product(product), a, b.t().contiguous())
        assert error <= 1.05 * rounding, f"{direction} {K}x{N}: error {error:.5f} against {rounding:.5f} of rounding"
        exact_error, _ = errors(exact(*product), a, b.t().contiguous())
        rows.append(
            {
                "K": K, "N": N, "direction": direction,
                "bf16_ms": median_ms(lambda a=a, b=b: a @ b),
                "gemm_ms": median_ms(lambda p=product: scaled_product(p)),
                "with_rows_ms": median_ms(lambda t=times, a=a: scaled_product(t(*quantize_rows(a)))),
                "exact_ms": median_ms(lambda p=product: exact(*p)),
                "error": error, "exact_error": exact_error, "rounding": rounding,
            }
        )  # fmt: skip
    return rows


def print_row(row):
    def rate(ms):
        return f"{ms:.3f} ({2 * T * row['K'] * row['N'] / ms / 1e9:.0f})"

    times = " | ".join(rate(row[name]) for name in ("bf16_ms", "gemm_ms", "with_rows_ms", "exact_ms"))
    print(
        f"| {row['K']} x {row['N']} | {row['direction']} | {times} | {row['bf16_ms'] / row['with_rows_ms']:.2f}x "
        f"| {row['error']:.5f}, {row['exact_error']:.5f}, {row['rounding']:.5f} |",
        flush=True,
    )


def measure_rows(K):
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    check_rows(x)
    source = torch.empty(T * K * 3 // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    ms, copy_ms = median_ms(lambda: quantize_rows(x)), median_ms(lambda: target.copy_(source))
    print(f"| {K} | {ms:.3f} | {3 * T * K / ms / 1e6:.0f} | {ms / copy_ms:.2f} |", flush=True)
    return {"K": K, "quantize_rows_ms": ms, "times_copy": ms / copy_ms}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_fp8 times GPU products: run it on a machine with a CUDA GPU of compute capability 8.9 or more.")
    if reason := why_not_fp8("cuda"):
        sys.exit(reason)
    torch.manual_seed(0)
    print("| K x N | | bf16 ms (TFLOP/s) | GEMM | with rows | exact | over bf16 | error, exact, rounding |")
    print("|---|---|---|---|---|---|---|---|")
    products = []
    for K, N in SHAPES:
        for row in measure(K, N):
            products.append(row)
            print_row(row)
    print("\n| row length | quantize_rows ms | GB/s | times a copy |\n|---|---|---|---|")
    rows = [measure_rows(K) for K in ROW_LENGTHS]
    if arguments.out:
        import triton

        record = {
            "command": " ".join(["python", *sys.argv]),
            "gpu": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
            "tokens": T,
            "products": products,
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
