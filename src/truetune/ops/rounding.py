"""Several small matrices, scaled and rounded to one dtype, in one launch.

An adapter's matrices are read by kernels that take 10 us and more, and there are two a linear. PyTorch rounds each in a
launch of its own, 2 us and 20 on the host; its `_foreach_copy_`, made for large tensors, takes 8.6 us for six of them
on an H200.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from truetune.ops.backend import cdiv, tl, triton, use_kernels

_MOST = 6
_BLOCK = 1024

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:
    _ENDS = [f"end{i}" for i in range(_MOST)]

    @triton.jit
    def _part(matrix_ptr, index, start, end, scale):
        value = tl.load(matrix_ptr + (index - start), mask=(index >= start) & (index < end), other=0.0)
        return value.to(tl.float32) * scale

    @triton.jit(do_not_specialize=_ENDS)
    def _round_kernel(
        matrix0_ptr, matrix1_ptr, matrix2_ptr, matrix3_ptr, matrix4_ptr, matrix5_ptr, out_ptr,
        end0, end1, end2, end3, end4, end5, factor0, factor1, factor2, factor3, factor4, factor5,
        MATRICES: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Matrix i is what lies in `out` before end i and behind those before it; an element is in one of them."""
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        out, end = _part(matrix0_ptr, index, 0, end0, factor0), end0
        if MATRICES > 1:
            out, end = out + _part(matrix1_ptr, index, end, end1, factor1), end1
        if MATRICES > 2:
            out, end = out + _part(matrix2_ptr, index, end, end2, factor2), end2
        if MATRICES > 3:
            out, end = out + _part(matrix3_ptr, index, end, end3, factor3), end3
        if MATRICES > 4:
            out, end = out + _part(matrix4_ptr, index, end, end4, factor4), end4
        if MATRICES > 5:
            out, end = out + _part(matrix5_ptr, index, end, end5, factor5), end5
        tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=index < end)


# ----------------------------------------------------------------------------------------------------------------------
# Launcher


def rounded(matrices: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Each matrix times its factor in fp32 (fp64 for fp64), row after row, one behind the other: one dimension, in
    `dtype`."""
    first, most = matrices[0], 2**31 - _BLOCK  # indices are int32
    kernel = use_kernels(first) and dtype != torch.float64 and len(matrices) <= _MOST
    if not kernel or sum(x.numel() for x in matrices) > most or any(x.dtype == torch.float64 for x in matrices):
        wide = [x if x.dtype == torch.float64 else x.float() for x in matrices]
        return torch.cat([(x * factor).to(dtype).flatten() for x, factor in zip(wide, factors, strict=True)])
    matrices = [x.contiguous() for x in matrices]
    ends, end = [], 0
    for x in matrices:
        end += x.numel()
        ends.append(end)
    missing = _MOST - len(matrices)
    out = torch.empty(end, dtype=dtype, device=first.device)
    with torch.cuda.device_of(first):
        _round_kernel[(cdiv(end, _BLOCK),)](
            *matrices, *[None] * missing, out, *ends, *[0] * missing, *factors, *[1.0] * missing,
            MATRICES=len(matrices), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out
