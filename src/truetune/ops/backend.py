"""Whether an operation runs as Triton kernels or in plain PyTorch."""

from functools import cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform
    triton = tl = None

FORCE_KERNELS = False  # tests set it, to run the kernels on a CPU in Triton's interpreter


def use_kernels(tensor: Tensor) -> bool:
    """Whether tensors like this one go through the Triton kernels, which know no fp64."""
    return kernels_on(tensor.device) and tensor.dtype != torch.float64


def kernels_on(device: torch.device) -> bool:
    """Whether there are Triton kernels for a device."""
    return triton is not None and (device.type == "cuda" or FORCE_KERNELS)


def by_tma(tensor: Tensor) -> bool:
    """Whether tiles of a matrix may come by TMA: elements are neighbours, rows and the first address multiples of 16
    bytes."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and row_bytes % 16 == 0 and row_bytes > 0 and tensor.data_ptr() % 16 == 0


def cdiv(a: int, b: int) -> int:
    """Triton's own, made for its compiler, takes several microseconds a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is at least 1; as `cdiv`."""
    return 1 << (n - 1).bit_length()


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU by NVIDIA; (0, 0) of others, which count in their own way, and where kernels are interpreted."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if nvidia else (0, 0)
