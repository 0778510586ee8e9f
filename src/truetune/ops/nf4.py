"""4-bit NormalFloat weights, as bitsandbytes stores them, back to half precision in one launch.

Blocks of 64 weights share a scale ("absmax"); with double quantization 256 scales share one of their own (Dettmers et
al., "QLoRA", arXiv:2305.14314). bitsandbytes takes four launches and about 80 us of Python for what one kernel does:
for a small model that was a third of the step.
"""

from typing import Any

import torch
from torch import Tensor

from truetune.ops.backend import cdiv, tl, triton, use_kernels

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernel

if triton is not None:

    @triton.jit
    def _dequantize_kernel(
        packed_ptr, absmax_ptr, code_ptr, absmax_code_ptr, absmax_absmax_ptr, offset_ptr, out_ptr, num_pairs,
        BLOCK_SIZE: tl.constexpr, NESTED_SIZE: tl.constexpr, NESTED: tl.constexpr, PAIRS: tl.constexpr,
    ):  # fmt: skip
        pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
        mask = pair < num_pairs
        byte = tl.load(packed_ptr + pair, mask=mask, other=0).to(tl.int32)
        block = pair * 2 // BLOCK_SIZE
        scale = tl.load(absmax_ptr + block, mask=mask, other=0)
        if NESTED:
            scale = tl.load(absmax_code_ptr + scale.to(tl.int32))
            scale = scale * tl.load(absmax_absmax_ptr + block // NESTED_SIZE, mask=mask, other=0.0)
            scale += tl.load(offset_ptr)
        first = tl.load(code_ptr + (byte >> 4)) * scale
        second = tl.load(code_ptr + (byte & 15)) * scale
        # Both halves of a byte are neighbours in the result.
        values = tl.interleave(first, second).to(out_ptr.dtype.element_ty)
        index = tl.program_id(0).to(tl.int64) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
        tl.store(out_ptr + index, values, mask=index < 2 * num_pairs)


# ----------------------------------------------------------------------------------------------------------------------
# Public functions


def dequantize_nf4(packed: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in `dtype` from bitsandbytes' packed 4-bit data and its `QuantState`, scaled in fp32."""
    pairs = packed.numel()
    if not use_kernels(packed) or packed.dtype != torch.uint8 or quant_state.shape.numel() != 2 * pairs:
        return dequantize_nf4_reference(packed, quant_state, dtype)
    out = torch.empty(quant_state.shape, dtype=dtype, device=packed.device)
    nested: tuple[Any, ...] = (None, None, None)
    if quant_state.nested:
        nested = (quant_state.state2.code, quant_state.state2.absmax, quant_state.offset)
    with torch.cuda.device_of(packed):
        _dequantize_kernel[(cdiv(pairs, 2048),)](
            packed, quant_state.absmax, quant_state.code, *nested, out, pairs,
            BLOCK_SIZE=quant_state.blocksize, NESTED_SIZE=quant_state.state2.blocksize if quant_state.nested else 1,
            NESTED=quant_state.nested, PAIRS=2048, num_warps=8,
            enable_fp_fusion=False,  # bitsandbytes rounds the scale's product before it adds the offset
        )  # fmt: skip
    return out


def dequantize_nf4_reference(packed: Tensor, quant_state: Any, dtype: torch.dtype) -> Tensor:
    """`dequantize_nf4` through bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, quant_state).to(dtype)
