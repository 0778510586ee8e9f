"""RMSNorm on one GPU, in bf16: achieved bandwidth, next to a plain copy of as many bytes and to Transformers.

    python benchmarks/bench_rms_norm.py --out benchmarks/results/rms_norm.json

Median times of `triton.testing.do_bench`, which empties the L2 cache before every run. Bytes are those of every tensor
that has to be read or written, once. Transformers is `LlamaRMSNorm` with what the case adds to it; its backward pass is
autograd's. Every case is checked on its own inputs before it is timed, against
fp64, which knows no kernels.
"""

from functools import partial

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bandwidth import Case, measure, nbytes, parse_arguments, print_header, write
from truetune.ops.rms_norm import rms_norm_backward, rms_norm_forward

EPS = 1e-5
SHAPES = [(16384, 4096), (16384, 1024), (16384 * 16, 128)]


def randn(T, H):
    return torch.randn(T, H, device="cuda", dtype=torch.bfloat16)


def double(*tensors):
    return [None if x is None else x.double() for x in tensors]


def forward_cases(T, H):
    x, other, module = randn(T, H), randn(T, H), LlamaRMSNorm(H, EPS).to("cuda", torch.bfloat16)
    weight = module.weight.data.normal_(1, 0.3)

    @torch.no_grad()
    def eager(added, residual, quantize):
        total = x if added is None else x + added
        y = module(total)
        if residual is not None:
            y = residual + y
        y8 = scale = None
        if quantize:
            scale = y.abs().amax(-1).float() / 448
            y8 = (y.float() / scale[:, None]).to(torch.float8_e4m3fn)
        return y, None if added is None else total, y8, scale

    def ours(added, residual, quantize):
        y, _, *rest = rms_norm_forward(x, weight, EPS, added_TH=added, residual_TH=residual, quantize=quantize)
        return y, *rest

    def exact(added, residual, quantize):
        residual, added = double(residual, added)
        y, _, total, *_ = rms_norm_forward(*double(x, weight), EPS, residual_TH=residual, added_TH=added)
        scale = y.abs().amax(-1) / 448 if quantize else None
        return y, total, y / scale[:, None] if quantize else None, scale

    two = nbytes(x, x)
    for name, options, num_bytes in (
        ("forward", (None, None, False), two),
        ("forward, x + added before", (other, None, False), 2 * two),
        ("forward, + residual after", (None, other, False), two + nbytes(x)),
        ("forward, FP8 too", (None, None, True), two + x.numel()),
    ):
        yield Case(f"{name}, {T} x {H}", num_bytes, *(partial(f, *options) for f in (ours, eager, exact)))


def backward_cases(T, H):
    x, dresidual, module = randn(T, H), randn(T, H), LlamaRMSNorm(H, EPS).to("cuda", torch.bfloat16)
    weight = module.weight.data.normal_(1, 0.3)
    dys = tuple(randn(T, H) for _ in range(3))
    _, rstd, *_ = rms_norm_forward(x, weight, EPS)
    leaf = x.clone().requires_grad_()
    y = module(leaf)

    def eager(count, dresidual, needs_weight):
        dx, *dweight = torch.autograd.grad(
            y, (leaf, module.weight) if needs_weight else (leaf,), sum(dys[1:count], dys[0]), retain_graph=True
        )
        return dx if dresidual is None else dx + dresidual, dweight[0] if needs_weight else None

    def ours(count, dresidual, needs_weight):
        return rms_norm_backward(dys[:count], x, weight, rstd, dresidual_TH=dresidual, needs_weight=needs_weight)

    def exact(count, dresidual, needs_weight):
        x_64, weight_64, dresidual = double(x, weight, dresidual)
        rstd_64 = (x_64.square().mean(-1) + EPS).rsqrt()
        options = {"dresidual_TH": dresidual, "needs_weight": needs_weight}
        return rms_norm_backward(tuple(double(*dys[:count])), x_64, weight_64, rstd_64, **options)

    one = nbytes(x)
    for name, options, num_bytes in (
        ("backward", (1, None, False), 3 * one),
        ("backward, + dresidual", (1, dresidual, False), 4 * one),
        ("backward, + dresidual, three dy", (3, dresidual, False), 6 * one),
        ("backward, + dresidual, dweight", (1, dresidual, True), 4 * one),
    ):
        yield Case(f"{name}, {T} x {H}", num_bytes, *(partial(f, *options) for f in (ours, eager, exact)))


def main():
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)
    print_header()
    results = []
    for shape in SHAPES:
        for cases in (forward_cases, backward_cases):
            results += [measure(case) for case in cases(*shape)]
    write(arguments.out, results)


if __name__ == "__main__":
    main()
