"""A frozen head's loss with the vocabulary split among programs, which read each logit once and write it once.

    python benchmarks/bench_split_loss.py --out benchmarks/results/split_loss.json

The library's kernel has one program a row and reads the logits twice, because a gradient needs the row's sum. What is
written here is exp(z - z_target), for which nothing has to be known of the row, and the sum becomes a factor of the row
of the product with the head's weights. Four launches: the targets' logits, the exponentials with each block's sums, a
program a row that joins them, and the factors. A block whose logits lie more than `MOST_BITS` above the target's takes
its own maximum for a reference, and its row is brought to one reference in the end.

A chunk of 4,096 rows; checked against fp64 before it is timed with `triton.testing.do_bench`. `copy` is a plain copy of
the logits: as many bytes.

Letters of tensor shapes: C rows of one chunk, V vocabulary, B blocks of a row.
"""

import torch
import triton
import triton.language as tl

from bandwidth import copy_ms, parse_arguments, write
from truetune.ops.backend import cdiv, next_power_of_2
from truetune.ops.cross_entropy import Loss, Rows, cross_entropy_chunk

CHUNKS = [(4096, 151936), (4096, 128256)]  # rows, vocabulary
CONFIGURATIONS = [(4096, 4), (4096, 8), (8192, 4), (8192, 8), (8192, 16), (16384, 8), (16384, 16)]  # block, warps

MOST_BITS = tl.constexpr(86.0)  # of exp(z - reference); bf16 and fp32 end at 128
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # below every logit, and finite: the difference of two of them is 0, not NaN


@triton.jit
def _join(total, weighted, before, more_total, more_weighted, other_before):
    return total + more_total, weighted + more_weighted, tl.maximum(before, other_before)


@triton.jit
def _exponentials_kernel(
    logits_ptr,  # [C, V] with row stride `stride`, -inf from V on; becomes exp(z - reference)
    targets_ptr, z_target_ptr,  # [C]
    parts_ptr,  # [5, C, B]: reference, sum, sum of exp(u) * u, maximum, maximum before the target
    stride, blocks, size, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    cols = block * BLOCK + tl.arange(0, BLOCK)
    place_ptr = logits_ptr + row * stride + cols
    z = tl.load(place_ptr, mask=cols < stride, other=float("-inf")).to(tl.float32)
    target, z_target = tl.load(targets_ptr + row), tl.load(z_target_ptr + row)
    top = tl.max(z, 0)
    reference = tl.maximum(z_target, LOWEST)
    reference = tl.where((top - reference) * LOG2_E > MOST_BITS, top, reference)
    below = z - reference
    e = tl.exp2(below * LOG2_E)
    tl.store(place_ptr, e.to(logits_ptr.dtype.element_ty), mask=cols < stride)
    weighted = e * tl.maximum(below, LOWEST)  # 0, not NaN, for z of -inf
    total, weighted, before = tl.reduce((e, weighted, tl.where(cols < target, z, LOWEST)), 0, _join)
    place = row * blocks + block
    tl.store(parts_ptr + place, reference)
    tl.store(parts_ptr + size + place, total)
    tl.store(parts_ptr + 2 * size + place, weighted)
    tl.store(parts_ptr + 3 * size + place, top)
    tl.store(parts_ptr + 4 * size + place, before)


@triton.jit
def _rows_kernel(
    logits_ptr, targets_ptr, z_target_ptr, row_weights_ptr, parts_ptr,
    loss_ptr, nll_ptr, entropy_ptr, top1_ptr, factor_ptr,  # [C]
    stride, V, blocks, size, HAS_ROW_WEIGHTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    part_ptr, there = parts_ptr + row * blocks + block, block < blocks
    references = tl.load(part_ptr, mask=there, other=LOWEST)
    target, z_target = tl.load(targets_ptr + row), tl.load(z_target_ptr + row)
    reference = tl.max(references, 0)
    shift = references - reference
    decay = tl.exp2(shift * LOG2_E)
    totals = tl.load(part_ptr + size, mask=there, other=0.0)
    total = tl.sum(totals * decay, 0)
    weighted = tl.sum((tl.load(part_ptr + 2 * size, mask=there, other=0.0) + totals * shift) * decay, 0)
    top = tl.max(tl.load(part_ptr + 3 * size, mask=there, other=LOWEST), 0)
    before = tl.max(tl.load(part_ptr + 4 * size, mask=there, other=LOWEST), 0)

    log_total = tl.log(total)
    nll = log_total - (z_target - reference)
    factor = 1.0 / total
    if HAS_ROW_WEIGHTS:
        factor *= tl.load(row_weights_ptr + row)
    tl.store(nll_ptr + row, nll)
    tl.store(loss_ptr + row, nll)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(top1_ptr + row, (z_target >= top) & (z_target > before))
    tl.store(factor_ptr + row, factor)

    row_ptr = logits_ptr + row * stride
    if tl.min(tl.where(there, shift, 0.0), 0) < 0.0:
        for i in range(blocks):
            ratio = tl.exp2((tl.load(parts_ptr + row * blocks + i) - reference) * LOG2_E)
            cols = i * BLOCK + tl.arange(0, BLOCK)
            e = tl.load(row_ptr + cols, mask=cols < stride, other=0.0).to(tl.float32)
            tl.store(row_ptr + cols, (e * ratio).to(logits_ptr.dtype.element_ty), mask=cols < stride)
        tl.debug_barrier()  # the target's is written a second time
    others = total - tl.exp2((z_target - reference) * LOG2_E)
    is_label = (target >= 0) & (target < V)
    tl.store(row_ptr + target, (-others).to(logits_ptr.dtype.element_ty), mask=is_label)


def split_loss_chunk(logits_CV: torch.Tensor, rows: Rows, block: int, warps: int) -> torch.Tensor:
    """Writes the rows' results, and over the logits their gradients over the factors [C], which it returns in fp32."""
    C, V = logits_CV.shape
    stride = logits_CV.stride(0)
    blocks = cdiv(stride, block)
    is_label = (rows.targets >= 0) & (rows.targets < V)
    z_target = logits_CV.gather(1, rows.targets.clamp(0, V - 1)[:, None]).squeeze(1).float()
    z_target = torch.where(is_label, z_target, torch.nan)  # a label outside the vocabulary must not pass unseen
    parts = torch.empty((5, C, blocks), device=logits_CV.device)
    factor = torch.empty_like(z_target)
    _exponentials_kernel[(C * blocks,)](
        logits_CV, rows.targets, z_target, parts, stride, blocks, C * blocks, BLOCK=block, num_warps=warps
    )
    _rows_kernel[(C,)](
        logits_CV, rows.targets, z_target, rows.weights, parts, rows.loss, rows.nll, rows.entropy, rows.is_top1, factor,
        stride, V, blocks, C * blocks, HAS_ROW_WEIGHTS=rows.weights is not None, BLOCKS=next_power_of_2(blocks),
        BLOCK=block, num_warps=4,
    )  # fmt: skip
    return factor


def results(C: int, targets: torch.Tensor, weights: torch.Tensor | None) -> Rows:
    empty = [torch.empty(C, device=targets.device) for _ in range(3)]
    return Rows(targets, weights, *empty, torch.empty(C, dtype=torch.bool, device=targets.device))


def inputs(C: int, V: int, device: str, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [C, V] in rows of a multiple of 64 elements, -inf behind them, and targets."""
    padded = torch.full((C, cdiv(V, 64) * 64), -torch.inf, dtype=torch.bfloat16, device=device)
    padded[:, :V] = torch.randn(C, V, device=device) * spread
    return padded, torch.randint(V, (C,), device=device)


def check(padded: torch.Tensor, V: int, targets: torch.Tensor, block: int, warps: int) -> dict[str, float]:
    """Errors relative to fp64: of the gradients' rows by their norm, of loss and entropy in nats."""
    weights = torch.rand(len(padded), device=padded.device)
    z = padded[:, :V].double()
    log_probs = z.log_softmax(-1)
    gradient = (log_probs.exp() - torch.nn.functional.one_hot(targets, V)) * weights[:, None]
    rows, ours = results(len(padded), targets, weights), padded.clone()
    factor = split_loss_chunk(ours[:, :V], rows, block, warps)
    difference = ours[:, :V].double() * factor.double()[:, None] - gradient
    entropy = -(log_probs.exp() * log_probs.clamp(min=-1e30)).sum(-1)
    assert torch.equal(rows.is_top1, z.argmax(-1) == targets), "top-1"
    return {
        "gradient": (difference.norm(dim=1) / gradient.norm(dim=1)).max().item(),
        "nll": (rows.nll + log_probs.gather(1, targets[:, None]).squeeze(1)).abs().max().item(),
        "entropy": (rows.entropy - entropy).abs().max().item(),
    }


def measure(C: int, V: int) -> dict:
    from triton.testing import do_bench

    padded, targets = inputs(C, V, "cuda")
    errors = check(padded[:256], V, targets[:256], 8192, 8)
    assert errors["gradient"] < 0.004 and errors["nll"] < 1e-4 and errors["entropy"] < 1e-3, errors
    rows, loss = results(C, targets, None), Loss(1.0, None, 0.0, False)
    restored = padded.clone()  # times do not depend on the values, but what is exponentiated again and again overflows

    def library() -> None:
        cross_entropy_chunk(padded[:, :V], None, rows, loss, write_grad=True)

    library_ms = do_bench(library, return_mode="median")
    ours = {}
    for block, warps in CONFIGURATIONS:
        padded.copy_(restored)
        ours[f"{block}x{warps}"] = do_bench(
            lambda b=block, w=warps: split_loss_chunk(padded[:, :V], rows, b, w), return_mode="median"
        )
    best = min(ours, key=lambda name: ours[name])
    copied_ms = copy_ms(2 * padded.numel() * padded.element_size())
    print(
        f"{C} x {V}: two passes {library_ms:.3f} ms, split {ours[best]:.3f} ({best}), copy {copied_ms:.3f}  {ours}",
        flush=True,
    )
    return {"rows": C, "vocabulary": V, "two_passes_ms": library_ms, "split_ms": ours, "copy_ms": copied_ms, **errors}


def main() -> None:
    arguments = parse_arguments(__doc__)
    write(arguments.out, [measure(C, V) for C, V in CHUNKS])


if __name__ == "__main__":
    main()
