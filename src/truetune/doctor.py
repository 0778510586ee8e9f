"""What this machine has and what is in effect on it: versions, devices, attention, kernels, and why not better ones."""

import importlib.metadata
import os
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from truetune.models.attention_backends import available_backends
from truetune.ops.backend import triton
from truetune.run_record import environment

FLASH_ATTENTION = ("flash-attn-4", "flash-attn-3", "flash-attn")


def gather() -> dict[str, Any]:
    """JSON-ready: `versions`, `platform`, `devices` (memory in GiB), `driver`, `no_gpu`, `attention`, `kernels`.

    `no_gpu` says why torch sees none, and is None where it does. `attention` and `kernels` have `in_effect` and the
    reason why a better one is not.
    """
    machine = environment()
    versions = {"python": machine["python"], **machine["versions"]}
    return {
        "versions": versions | {name: _version(name) for name in FLASH_ATTENTION},
        "platform": machine["platform"],
        "devices": _devices(),
        "driver": machine["driver"],
        "no_gpu": _why_no_gpu(),
        "attention": _attention(),
        "kernels": _kernels(),
    }


def render(found: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `gather` found as tables."""
    console = console or Console(highlight=False)
    table = _table("Versions", "", "")
    for name, version in found["versions"].items():
        table.add_row(name, version or "[dim]not installed")
    table.add_row("platform", found["platform"])
    table.add_row("driver", found["driver"] or "[dim]none")
    console.print(table)

    table = _table("Devices", "", "memory", "compute capability")
    for device in found["devices"]:
        capability = device["compute_capability"] or ""
        table.add_row(device["name"], f"{device['memory_gib']:.1f} GiB", capability)
    console.print(table)
    if found["no_gpu"]:
        console.print(f"No GPU: {found['no_gpu']}.")

    attention = found["attention"]
    table = _table(f"Attention: {attention['in_effect']}", "best first", "version", "why not")
    for backend in attention["backends"]:
        style = "bold green" if backend["name"] == attention["in_effect"] else ""
        table.add_row(backend["name"], backend["version"] or "", backend["why_not"] or "", style=style)
    console.print(table)
    if attention["mend"]:
        console.print(attention["mend"])

    table = _table("Kernels", "", "in effect", "why not better")
    for name, kernel in found["kernels"].items():
        table.add_row(name, kernel["in_effect"], kernel["why"] or "")
    console.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        memory = _gib(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return [{"name": f"CPU, {os.cpu_count()} cores", "memory_gib": memory, "compute_capability": None}]
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = _gib(properties.total_memory)
        devices.append({"name": properties.name, "memory_gib": memory, "compute_capability": capability})
    return devices


def _gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 1)


def _why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is a CPU build"
    return "torch finds no GPU; nvidia-smi says whether the driver does"


def _attention() -> dict[str, Any]:
    """What a model of ordinary heads in bf16 gets; softcap, sinks or wide heads can need another."""
    backends = available_backends()
    best = next(backend.name for backend in backends if backend.why_not is None)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
    mend = "FlashAttention-4 is faster here: pip install truetune\\[hopper]" if hopper and best[-1] != "4" else None
    listed = [{"name": b.name, "version": b.version, "why_not": b.why_not} for b in backends]
    return {"in_effect": best, "backends": listed, "mend": mend}


def _kernels() -> dict[str, dict[str, str | None]]:
    if triton is None:
        reason = "Triton is not installed"
    elif not torch.cuda.is_available():
        reason = "the Triton kernels need a GPU"
    else:
        reason = None
    return {
        "linear cross-entropy": {"in_effect": "PyTorch" if reason else "Triton", "why": reason},
        "4-bit weights": _bitsandbytes(),
    }


def _bitsandbytes() -> dict[str, str | None]:
    try:
        import bitsandbytes
    except Exception as error:  # without its library for this CUDA it fails in ways of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"in_effect": "none", "why": f"bitsandbytes cannot be imported: {reason}"}
    return {"in_effect": f"bitsandbytes {bitsandbytes.__version__}", "why": None}
