"""Dropout whose mask is a function of a seed, so that the backward pass makes it again instead of keeping it.

Each row has a stream of its own, `seed` + its number: a part of the rows gets the mask that it has in the whole
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011, as Triton has it).

Letters of tensor shapes: T rows, K columns.
"""

import torch
from torch import Tensor

from truetune.ops.backend import cdiv, next_power_of_2, tl, triton, use_kernels

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:

    @triton.jit(do_not_specialize=["seed"])
    def _seeded_dropout_kernel(
        x_ptr, add_ptr, out_ptr, x_stride, width, seed, p, HAS_ADD: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = col < width
        x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        out = tl.where(tl.rand(seed + row, col) >= p, x / (1.0 - p), 0.0)
        if HAS_ADD:
            out += tl.load(add_ptr + row * width + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * width + col, out.to(out_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# Public function


def seeded_dropout(x_TK: Tensor, p: float, seed: int, *, add_TK: Tensor | None = None) -> Tensor:
    """x with a share p of its elements set to 0 and the rest divided by 1 - p (+ `add_TK`, contiguous): [T, K].

    The same seed gives the same mask. It is its own backward pass. Not differentiable.
    """
    if not use_kernels(x_TK):
        return seeded_dropout_reference(x_TK, p, seed, add_TK=add_TK)
    T, K = x_TK.shape
    out_TK = torch.empty((T, K), dtype=x_TK.dtype, device=x_TK.device)
    if T:
        block = min(1024, next_power_of_2(K))
        with torch.cuda.device_of(x_TK):
            _seeded_dropout_kernel[(T, cdiv(K, block))](
                x_TK, add_TK, out_TK, x_TK.stride(0), K, seed, p, HAS_ADD=add_TK is not None, BLOCK_K=block, num_warps=4
            )
    return out_TK


def seeded_dropout_reference(x_TK: Tensor, p: float, seed: int, *, add_TK: Tensor | None = None) -> Tensor:
    """`seeded_dropout` in plain PyTorch, with another generator and so another mask."""
    generator = torch.Generator(x_TK.device).manual_seed(seed)
    keep = torch.rand(x_TK.shape, generator=generator, device=x_TK.device) >= p
    out_TK = torch.where(keep, x_TK / max(1 - p, 1e-30), 0.0).to(x_TK.dtype)
    return out_TK if add_TK is None else out_TK + add_TK
