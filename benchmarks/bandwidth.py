"""For kernels that are bound by memory: their time next to a plain copy of as many bytes and to the eager path."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

CALLS, ROUNDS = 10, 7  # of a graph, and how often each is replayed


class Case(NamedTuple):
    """One row of the table. Either way of doing it gives tensors, which are compared to those of `exact`, in fp64."""

    name: str
    num_bytes: int  # that have to be read and written
    ours: Callable[[], tuple]
    eager: Callable[[], tuple]
    exact: Callable[[], tuple]


def nbytes(*tensors) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def parse_arguments(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark times GPU kernels and torch sees no CUDA GPU: run it on a machine that has one.")
    return arguments


def check(case: Case) -> None:
    """Raises where our error is more than 1.5 times that of the eager path."""
    triples = zip(case.ours(), case.eager(), case.exact(), strict=True)
    for i, (ours, eager, exact) in enumerate(triples):
        if exact is None:
            continue
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (ours, eager)]
        if not errors[0] <= max(1.5 * errors[1], 1e-6):
            raise AssertionError(f"{case.name}: result {i} has error {errors[0]:.1e}, the eager path {errors[1]:.1e}.")


def error_of(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.float() - exact).norm() / exact.norm()).item()


def copy_ms(num_bytes: int) -> float:
    """A copy that reads half of the bytes and writes the other half."""
    from triton.testing import do_bench

    source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return do_bench(lambda: target.copy_(source), return_mode="median")


def graphs_ms(steps: Sequence[Callable[[], object]]) -> list[float]:
    """Milliseconds of each, medians of replayed CUDA graphs by turns: whatever a launch takes on the host."""
    graphs = []
    for step in steps:
        step()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                step()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for graph, of_graph in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            of_graph.append(begin.elapsed_time(end) / CALLS)
    return [statistics.median(of_graph) for of_graph in times]


def measure(case: Case) -> dict:
    from triton.testing import do_bench

    check(case)
    ours, eager = (do_bench(step, return_mode="median") for step in (case.ours, case.eager))
    copy = copy_ms(case.num_bytes)
    result = {
        "case": case.name, "mb": case.num_bytes / 1e6, "ms": ours, "gb_per_s": case.num_bytes / ours / 1e6,
        "over_copy": ours / copy, "eager_ms": eager, "eager_over_ours": eager / ours,
    }  # fmt: skip
    print(
        f"| {case.name} | {result['mb']:.0f} | {ours:.3f} | {result['gb_per_s']:.0f} | {result['over_copy']:.2f}x "
        f"| {eager:.3f} ({result['eager_over_ours']:.1f}x) |",
        flush=True,
    )
    return result


def print_header() -> None:
    print("| case | MB | ms | GB/s | over a copy | Transformers ms |")
    print("|---|---|---|---|---|---|")


def write(path: Path | None, results: list[dict]) -> None:
    if path is None:
        return
    import triton

    record = {
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
