"""Linear cross-entropy on one GPU, forward and backward, against the matrix products that no exact method can spare.

    python benchmarks/bench_linear_cross_entropy.py --out benchmarks/results/linear_cross_entropy.json
    python benchmarks/bench_linear_cross_entropy.py --tune     # settings of the kernel alone

A row of the table is a head (H, V, frozen or trained) and the share of 16,384 positions that carry a label. `GEMMs` is
the time of the products alone, on the kept rows in chunks of 4,096. `loss` is `linear_cross_entropy(hidden, weight,
labels)`; `step` is what the trainer calls: the rows given, the statistics made. Both take turns with the GEMMs, so that
clocks are alike, and the ratios are to the GEMMs of the same run. `GiB` is the peak above what was allocated before,
the gradients included. Errors are those of the gradients against fp32 without TF32, over those of PyTorch with full
logits in bf16 and its softmax in fp32.
"""

import argparse
import json
import statistics
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F

from truetune.ops import cross_entropy, linear_cross_entropy

head = import_module("truetune.ops.linear_cross_entropy")

N = 16384
HEADS = [(4096, 128256), (1024, 151936)]


def make(H, V, trained, keep):
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(V, H, device="cuda") * H**-0.5).bfloat16().requires_grad_(trained)
    labels = torch.randint(0, V, (N,), device="cuda")
    labels[torch.rand(N, device="cuda") > keep] = -100
    return hidden, weight, labels


def gemms(hidden, weight, rows, chunk=4096):
    """The products alone: logits, their gradient to the hidden states and, of a trained head, to the weight."""
    trained, hidden, weight = weight.requires_grad, hidden.detach()[rows], weight.detach()
    logits = torch.randn(min(len(rows), chunk), len(weight), device="cuda", dtype=torch.bfloat16)
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if trained else None

    def step():
        for start in range(0, len(rows), chunk):
            part = hidden[start : start + chunk]
            out = logits[: len(part)]
            torch.mm(part, weight.T, out=out)
            torch.mm(out, weight, out=d_hidden[start : start + chunk])
            if trained:
                torch.addmm(d_weight, out.T, part, out_dtype=torch.float32, out=d_weight)

    return step


def milliseconds(steps, rounds=10):
    """Median time of each of the steps, which take turns."""
    times = [[] for _ in steps]
    for i in range(rounds + 3):
        for step, record in zip(steps, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            if i >= 3:
                record.append(start.elapsed_time(end))
    return [statistics.median(record) for record in times]


def peak_gib(step):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def exact_gradients(hidden, weight, labels, rows):
    hidden_NH, weight_VH = hidden.detach().float(), weight.detach().float()
    d_hidden, d_weight = torch.zeros_like(hidden_NH), torch.zeros_like(weight_VH)
    for part in rows.split(1024):
        grad = (hidden_NH[part] @ weight_VH.T).softmax(-1)
        grad[torch.arange(len(part), device="cuda"), labels[part]] -= 1
        d_hidden[part] = grad @ weight_VH / len(rows)
        d_weight.addmm_(grad.T, hidden_NH[part], alpha=1 / len(rows))
    return d_hidden, d_weight


def error_ratios(hidden, weight, labels, rows):
    """Error of each gradient over that of plain PyTorch."""
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), leaves)
    plain = torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), labels), leaves)
    exact = exact_gradients(hidden, weight, labels, rows)
    return [((a - c).norm() / (b - c).norm()).item() for a, b, c in zip(ours, plain, exact, strict=False)]


def measure(H, V, trained, keep):
    hidden, weight, labels = make(H, V, trained, keep)
    rows = (labels != -100).nonzero().squeeze(1)
    items = torch.tensor(len(rows), device="cuda")

    def loss():
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, labels).backward()

    def step():
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, labels, rows=rows, num_items=items, return_stats=True)[0].backward()

    gemms_ms, loss_ms, step_ms = milliseconds([gemms(hidden, weight, rows), loss, step])
    hidden.grad = weight.grad = None
    result = {
        "H": H, "V": V, "trained": trained, "keep": keep, "rows": len(rows),
        "gemms_ms": gemms_ms, "loss_ms": loss_ms, "step_ms": step_ms,
        "loss_over_gemms": loss_ms / gemms_ms, "step_over_gemms": step_ms / gemms_ms,
        "extra_gib": peak_gib(step),
    }  # fmt: skip
    hidden.grad = weight.grad = None
    result["error_over_plain"] = error_ratios(hidden, weight, labels, rows)
    return result


def print_row(result):
    errors = ", ".join(f"{ratio:.2f}" for ratio in result["error_over_plain"])
    print(
        f"| {result['H']} | {result['V']} | {'trained' if result['trained'] else 'frozen'} | {result['keep']:.0%} "
        f"| {result['gemms_ms']:.2f} | {result['loss_ms']:.2f} ({result['loss_over_gemms']:.2f}x) "
        f"| {result['step_ms']:.2f} ({result['step_over_gemms']:.2f}x) | {result['extra_gib']:.2f} | {errors} |",
        flush=True,
    )


def tune():
    """Time and rate of the kernel on one chunk, its logits counted once read and once written."""
    for V in (128256, 151936, 151937):
        rows = head._chunk_rows(N, V * 2, kernels=True)
        stride = -(-V // 64) * 64
        fresh = torch.randn(rows, stride, device="cuda", dtype=torch.bfloat16)
        fresh[:, V:] = -torch.inf
        logits = fresh[:, :V]
        targets = torch.randint(0, V, (rows,), device="cuda")
        outputs = [torch.empty(rows, device="cuda") for _ in range(3)]
        is_top1 = torch.empty(rows, device="cuda", dtype=torch.bool)
        for warps in (4, 8, 16, 32):
            for stages in (1, 2, 3, 5, 9):  # 9 of 32 warps: shared memory for one row a multiprocessor
                cross_entropy._NUM_WARPS, cross_entropy._STAGES = warps, stages
                rows_of_chunk = cross_entropy.Rows(targets, None, *outputs, is_top1)
                call = (logits, None, rows_of_chunk, cross_entropy.Loss(1.0, None, 0.0, False), True)
                (ms,) = milliseconds([lambda call=call: cross_entropy.cross_entropy_chunk(*call)])
                rate = 2 * logits.numel() * 2 / ms / 1e9
                print(f"V {V} rows {rows} warps {warps:2d} stages {stages}: {ms:.3f} ms, {rate:.2f} TB/s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--tune", action="store_true", help="time the kernel's settings instead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.tune:
        tune()
        return
    print("| H | V | head | kept | GEMMs ms | loss ms | step ms | GiB | errors over plain (hidden, weight) |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for H, V in HEADS:
        for trained in (False, True):
            for keep in (1.0, 0.3):
                results.append(measure(H, V, trained, keep))
                print_row(results[-1])
                torch.cuda.empty_cache()
    if arguments.out:
        import triton

        record = {
            "command": " ".join(["python", *sys.argv]),
            "gpu": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
            "positions": N,
            "results": results,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
