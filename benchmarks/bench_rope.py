"""Rotary embedding of queries and keys on one GPU, in bf16, alone and with the heads' RMSNorm before it: achieved
bandwidth, next to a plain copy of as many bytes and to Transformers.

    python benchmarks/bench_rope.py --out benchmarks/results/rope.json

Median times of `triton.testing.do_bench`, which empties the L2 cache before every run. Bytes are those of every tensor
that has to be read or written, once. Transformers is `apply_rotary_pos_emb` and `Qwen3RMSNorm`, backward by autograd.
Every case is checked on its own inputs before it is timed, against fp64, which knows no kernels.
"""

from functools import partial

import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from bandwidth import Case, measure, nbytes, parse_arguments, print_header, write
from truetune.ops.rope import rope_backward, rope_forward

T, D, EPS = 16384, 128, 1e-6


def make(heads, key_heads):
    """q, k, dq, dk, cos, sin."""
    q, k, dq, dk = (
        torch.randn(T, n, D, device="cuda", dtype=torch.bfloat16) for n in (heads, key_heads, heads, key_heads)
    )
    angle = torch.arange(T, device="cuda")[:, None] * 1e6 ** -(torch.arange(0, D, 2, device="cuda") / D)
    angle = torch.cat((angle, angle), -1)
    return q, k, dq, dk, angle.cos().bfloat16(), angle.sin().bfloat16()


def double(*tensors):
    return [x.double() for x in tensors]


def cases(heads, key_heads, with_norms):
    q, k, dq, dk, cos, sin = make(heads, key_heads)
    norms = [Qwen3RMSNorm(D, EPS).to(q) for _ in range(2)] if with_norms else [torch.nn.Identity()] * 2
    weights = [norm.weight.data.normal_(1, 0.3) for norm in norms] if with_norms else [None, None]
    options = {"q_weight": weights[0], "k_weight": weights[1], "eps": EPS}
    saved = {"q": q, "k": k} if with_norms else {}
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    trained = [norm.weight for norm in norms] if with_norms else []

    def rotate(q, k):
        return apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin, unsqueeze_dim=1)

    rotated = rotate(*leaves)

    @torch.no_grad()
    def eager_forward():
        return rotate(q, k)

    def eager_backward(needs_weight):
        wanted = [*leaves, *(trained if needs_weight else [])]
        grads = torch.autograd.grad(rotated, wanted, (dq, dk), retain_graph=True)
        return grads if needs_weight else (*grads, None, None)

    exact_options = {key: x.double() if isinstance(x, torch.Tensor) else x for key, x in (options | saved).items()}

    def exact_forward():
        return rope_forward(*double(q, k, cos, sin), **{key: exact_options[key] for key in options})

    def exact_backward(needs_weight):
        return rope_backward(*double(dq, dk, cos, sin), **exact_options, needs_weight=needs_weight)

    shape = f"{heads}+{key_heads} heads{', norms' if with_norms else ''}"
    tables, one = nbytes(cos, sin), nbytes(q, k)
    ours_forward = partial(rope_forward, q, k, cos, sin, **options)
    yield Case(f"forward, {shape}", tables + 2 * one, ours_forward, eager_forward, exact_forward)
    for needs_weight in (False, True) if with_norms else (False,):
        ours_backward = partial(rope_backward, dq, dk, cos, sin, **options, **saved, needs_weight=needs_weight)
        yield Case(
            f"backward, {shape}{', dweights' if needs_weight else ''}", tables + (3 if with_norms else 2) * one,
            ours_backward, partial(eager_backward, needs_weight), partial(exact_backward, needs_weight),
        )  # fmt: skip


def main():
    arguments = parse_arguments(__doc__)
    torch.manual_seed(0)
    print_header()
    results = []
    for heads, key_heads, with_norms in ((32, 8, False), (16, 8, False), (32, 8, True), (16, 8, True)):
        results += [measure(case) for case in cases(heads, key_heads, with_norms)]
    write(arguments.out, results)


if __name__ == "__main__":
    main()
