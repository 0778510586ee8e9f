"""Gated activations on one GPU: time and memory rate of each kernel, against a plain copy of as many bytes.

    python benchmarks/bench_swiglu.py --out benchmarks/results/swiglu.json
    python benchmarks/bench_swiglu.py --tune     # tile sizes

16,384 tokens, gate and up the halves of one bf16 buffer. `forward` writes act; `backward` writes both gradients over
gate and up and act over its own gradient; `+fp8` gives the results in FP8 too. GB/s counts each byte that has to move
once. Before it is timed, each is checked against fp64 on fresh random inputs. PyTorch's own lines are its two kernels
forward and what autograd makes of them backward. Times are medians of `triton.testing.do_bench`, which clears the L2
cache between runs.
"""

import argparse
import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from truetune.ops.fp8 import why_not_fp8
from truetune.ops.swiglu import glu_backward, glu_forward, glu_reference

swiglu = import_module("truetune.ops.swiglu")

T = 16384
WIDTHS = (14336, 3072)


def make(width):
    gate_up = torch.randn(T, 2 * width, device="cuda", dtype=torch.bfloat16)
    return gate_up[:, :width], gate_up[:, width:], torch.randn(T, width, device="cuda", dtype=torch.bfloat16)


def median_ms(step):
    from triton.testing import do_bench

    return do_bench(step, warmup=50, rep=300, return_mode="median")


def copy_ms(num_bytes):
    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return median_ms(lambda: target.copy_(source))


def check(width, activation, fp8):
    """Against fp64 on 256 tokens, all of them made and read as in the timed run."""
    gate, up, dact = make(width)
    rows = torch.randperm(T, device="cuda")[:256]
    leaves = [x[rows].double().requires_grad_() for x in (gate, up)]
    act = glu_reference(*leaves, activation)
    exact = [act, *torch.autograd.grad(act, leaves, dact[rows].double())]
    ours, act8, scale = glu_forward(gate, up, activation, quantize=fp8)
    grads = glu_backward(dact, gate, up, activation, act_out=dact, quantize=fp8)
    for value, true in zip((ours, grads.dgate_TI, grads.dup_TI), exact, strict=True):
        error = (value[rows].double() - true).abs() - 2**-8 * true.abs()
        assert error.max() <= 1e-5, f"{activation} at {width}: wrong by {error.max().item():.1e} beyond bf16 rounding"
    assert torch.equal(grads.act_TI, ours), f"{activation} at {width}: act made again is another"
    pairs = [(act8, scale, ours), (*grads[3:5], grads.dgate_TI), (*grads[5:7], grads.dup_TI)] if fp8 else []
    for x8, scale_T, x in pairs:
        x8, x, scale_T1 = x8[rows].double(), x[rows].double(), scale_T[rows].double()[:, None]
        bound = torch.maximum(x.abs() * 2**-4, scale_T1 * 2**-10) * (1 + 1e-6)
        assert ((x8 * scale_T1 - x).abs() <= bound).all(), f"{activation} at {width}: FP8 is not rounded to the nearest"


def measure(width, activation, fp8):
    """Rows of (what, ms, bytes moved)."""
    gate, up, dact = make(width)
    elements = T * width
    forward = partial(glu_forward, gate, up, activation)
    # In place: the values change from run to run, what moves does not.
    backward = partial(glu_backward, dact, gate, up, activation, act_out=dact)
    rows = [("forward", median_ms(forward), 6 * elements)]
    leaves = [x.detach().clone().requires_grad_() for x in (gate, up)]
    rows.append(("forward, PyTorch", median_ms(lambda: glu_reference(*leaves, activation)), 6 * elements))
    act = glu_reference(*leaves, activation)
    plain = partial(torch.autograd.grad, act, leaves, dact.clone(), retain_graph=True)
    rows.append(("backward", median_ms(backward), 12 * elements))
    rows.append(("backward, PyTorch", median_ms(plain), 12 * elements))
    if fp8:
        rows.append(("forward+fp8", median_ms(partial(forward, quantize=True)), 7 * elements))
        rows.append(("backward+fp8", median_ms(partial(backward, quantize=True)), 14 * elements))
    return rows


def tune(fp8):
    settings = [("_TILE", size, False) for size in (512, 1024, 2048)]
    settings += [("_ROW_TILE", size, True) for size in (1024, 2048, 4096, 8192)] if fp8 else []
    for width in WIDTHS:
        gate, up, dact = make(width)
        for name, size, quantize in settings:
            before = getattr(swiglu, name)
            setattr(swiglu, name, size)
            forward = median_ms(partial(glu_forward, gate, up, "silu", quantize=quantize))
            backward = median_ms(partial(glu_backward, dact, gate, up, "silu", act_out=dact, quantize=quantize))
            setattr(swiglu, name, before)
            print(f"I {width} {name} {size}: forward {forward:.3f} ms, backward {backward:.3f} ms", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--tune", action="store_true", help="time tile sizes instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_swiglu times GPU kernels: run it on a machine with a CUDA GPU.")
    torch.manual_seed(0)
    fp8 = why_not_fp8("cuda") is None
    if arguments.tune:
        tune(fp8)
        return
    print("| I | activation | what | ms | GB/s | times a copy |\n|---|---|---|---|---|---|")
    results = []
    for width in WIDTHS:
        for activation in ("silu", "gelu_tanh", "gelu"):
            check(width, activation, fp8)
            for what, ms, num_bytes in measure(width, activation, fp8):
                ratio = ms / copy_ms(num_bytes)
                results.append({"I": width, "activation": activation, "what": what, "ms": ms, "times_copy": ratio})
                print(
                    f"| {width} | {activation} | {what} | {ms:.3f} | {num_bytes / ms / 1e6:.0f} | {ratio:.2f} |",
                    flush=True,
                )
    if arguments.out:
        import triton

        record = {
            "command": " ".join(["python", *sys.argv]),
            "gpu": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
            "tokens": T,
            "results": results,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
