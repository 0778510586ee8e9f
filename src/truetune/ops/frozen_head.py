"""The loss of a frozen head, its softmax made where its logits are made: on Hopper, in bf16.

The kernel that makes the product writes exp(z - z_label) where the logits would stand. For that nothing has to be known
of a row but its label's logit, which is a product of two vectors; the row's sum is a factor of its gradient

    d_hidden = (E @ weight - others * weight[label]) / sum,    E without the label's, others the sum without it

and so it may become known last. No pass over the logits is left, and the vocabulary goes through in slabs, whose
exponentials are all that is held. Where logits of a tile lie more than 80 powers of 2 above the label's, its largest
takes the label's place, and the row is brought to one reference when the slab's sums are joined.

Letters of tensor shapes: C rows of one chunk, H hidden size, V vocabulary, S columns of a slab, B tiles of a slab.
"""

import math

import torch
from torch import Tensor

from truetune.ops.backend import (
    by_tma,
    cdiv,
    compute_capability,
    kernels_on,
    next_power_of_2,
    num_multiprocessors,
    tl,
    triton,
)
from truetune.ops.cross_entropy import Loss, Rows, accumulate_product

_BLOCK_C, _BLOCK_S, _BLOCK_H, _NUM_WARPS, _NUM_STAGES = 128, 256, 64, 8, 4  # tiles of the product
_MOST_COLUMNS = 2**16  # of a slab: of 4,096 rows 2**29 bytes, large enough that a slab's three launches cost little

# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels

if triton is not None:
    from truetune.ops.cross_entropy import weigh_row

    _LOWEST = tl.constexpr(-1.0e30)  # below every logit, and finite: the difference of two of them is 0, not NaN
    _MOST_BITS = tl.constexpr(80.0)  # of exp(z - z_label); 2^18 of them, times weights, are within fp32
    _LN_2 = tl.constexpr(math.log(2))
    _TIE = tl.constexpr(1e-5)  # the label's logit comes of another product than its tile's, if with the same sums

    # No kernel of its own for every number of rows whose multiples 16 divides, or does not.
    @triton.jit(do_not_specialize=["C", "V"])
    def _label_logits_kernel(
        hidden_ptr, weight_ptr, labels_ptr, z_label_ptr, C, V, H, unit_log2, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr
    ):
        """On the tensor cores, whose sums are those of the tiles; of each product only the diagonal is wanted."""
        row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        label = tl.load(labels_ptr + row, mask=row < C, other=0).to(tl.int64)
        is_label = (label >= 0) & (label < V)
        hidden_ptr += row.to(tl.int64)[:, None] * H
        weight_ptr += tl.where(is_label, label, 0)[:, None] * H
        z = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, H, BLOCK_H):
            h = (start + tl.arange(0, BLOCK_H))[None, :]
            hidden = tl.load(hidden_ptr + h, mask=(row < C)[:, None] & (h < H), other=0.0)
            z = tl.dot(hidden, tl.load(weight_ptr + h, mask=h < H, other=0.0).T, z)
        diagonal = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
        z_label = tl.sum(tl.where(diagonal, z, 0.0), 1) * unit_log2
        # A label outside the vocabulary must not pass unseen.
        tl.store(z_label_ptr + row, tl.where(is_label, z_label, float("nan")), mask=row < C)

    @triton.jit
    def _reference(top, z_label):
        return tl.where(top - z_label > _MOST_BITS, top, z_label)

    @triton.jit(do_not_specialize=["C", "S", "blocks", "size", "programs"])
    def _exponentials_kernel(
        hidden_desc, weight_desc, exp_desc,
        z_label_ptr,  # [C], as all logits here in units of a factor of 2
        sums_ptr,  # [3, C, B]: the largest logit, the sum of 2^u, and that of 2^u * u
        C, S, H, unit_log2, blocks, size, programs, STATS: tl.constexpr,
        BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """exp = 2^u, u = z - reference."""
        blocks_c = tl.cdiv(C, BLOCK_C)
        for tile in tl.range(tl.program_id(0), blocks_c * blocks, programs, flatten=True):
            block, start = tile // blocks_c, tile % blocks_c * BLOCK_C  # a chunk's hidden states stay in the cache
            z = tl.zeros([BLOCK_C, BLOCK_S], tl.float32)
            for h in range(0, H, BLOCK_H):
                z = tl.dot(hidden_desc.load([start, h]), weight_desc.load([block * BLOCK_S, h]).T, z)

            # In two halves, which need half of the shared memory.
            left, right = z.reshape(BLOCK_C, 2, BLOCK_S // 2).permute(0, 2, 1).split()
            row, col = start + tl.arange(0, BLOCK_C), block * BLOCK_S + tl.arange(0, BLOCK_S // 2)
            if (block + 1) * BLOCK_S > S:
                left = tl.where((col < S)[None, :], left, _LOWEST)
                right = tl.where((col + BLOCK_S // 2 < S)[None, :], right, _LOWEST)
            top = tl.max(tl.maximum(left, right), 1) * unit_log2
            reference = _reference(top, tl.load(z_label_ptr + row, mask=row < C, other=0.0))
            u = left * unit_log2 - reference[:, None]
            e = tl.exp2(u)
            exp_desc.store([start, block * BLOCK_S], e.to(tl.bfloat16))
            total, weighted = tl.sum(e, 1), tl.sum(e * u, 1)
            u = right * unit_log2 - reference[:, None]
            e = tl.exp2(u)
            exp_desc.store([start, block * BLOCK_S + BLOCK_S // 2], e.to(tl.bfloat16))
            place_ptr = sums_ptr + row * blocks + block
            tl.store(place_ptr, top, mask=row < C)
            tl.store(place_ptr + size, total + tl.sum(e, 1), mask=row < C)
            if STATS:
                tl.store(place_ptr + 2 * size, weighted + tl.sum(e * u, 1), mask=row < C)

    @triton.jit(do_not_specialize=["C", "S", "first_col", "blocks", "size"])
    def _join_kernel(
        exp_ptr, sums_ptr, labels_ptr, z_label_ptr, d_hidden_ptr,
        state_ptr,  # [5, C]: reference, sum, sum of 2^u * u, the largest logit, the largest before the label's
        C, S, H, exp_stride, first_col, blocks, size, FIRST: tl.constexpr, STATS: tl.constexpr,
        BLOCKS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """One program a row: adds a slab's sums to the row's, and takes the label out of the exponentials."""
        row = tl.program_id(0).to(tl.int64)
        block = tl.arange(0, BLOCKS)
        there = block < blocks
        sums_ptr += row * blocks
        exp_ptr += row * exp_stride
        state_ptr += row
        label, z_label = tl.load(labels_ptr + row) - first_col, tl.load(z_label_ptr + row)
        tops = tl.load(sums_ptr + block, mask=there, other=_LOWEST)
        totals = tl.load(sums_ptr + size + block, mask=there, other=0.0)
        references = _reference(tops, z_label)
        old_reference, old_total, old_weighted, top, top_before = z_label, 0.0, 0.0, _LOWEST, _LOWEST
        if not FIRST:
            old_reference, old_total = tl.load(state_ptr), tl.load(state_ptr + C)
            old_weighted = tl.load(state_ptr + 2 * C)
            top, top_before = tl.load(state_ptr + 3 * C), tl.load(state_ptr + 4 * C)
        reference = tl.maximum(old_reference, tl.max(references, 0))
        moved, shift = old_reference - reference, references - reference
        decay = tl.exp2(shift)
        tl.debug_barrier()  # every thread has read the row's state
        tl.store(state_ptr, reference)
        tl.store(state_ptr + C, old_total * tl.exp2(moved) + tl.sum(totals * decay, 0))
        if STATS:
            weighted = tl.load(sums_ptr + 2 * size + block, mask=there, other=0.0)
            weighted = tl.sum((weighted + totals * shift) * decay, 0)
            tl.store(state_ptr + 2 * C, (old_weighted + old_total * moved) * tl.exp2(moved) + weighted)
            own = label // BLOCK_S
            tl.store(state_ptr + 3 * C, tl.maximum(top, tl.max(tops, 0)))
            top_before = tl.maximum(top_before, tl.max(tl.where(block < own, tops, _LOWEST), 0))
            # Within the label's own tile the exponentials decide, as they are rounded.
            col = own * BLOCK_S + tl.arange(0, BLOCK_S)
            e = tl.load(exp_ptr + col, mask=(col >= 0) & (col < S), other=-1.0).to(tl.float32)
            e_label, e_before = tl.max(tl.where(col == label, e, -1.0), 0), tl.max(tl.where(col < label, e, -1.0), 0)
            if (label >= 0) & (label < S) & (e_before >= e_label):
                top_before = tl.maximum(top_before, tl.max(tl.where(block == own, tops, _LOWEST), 0))
            tl.store(state_ptr + 4 * C, top_before)

        if tl.min(tl.where(there, shift, 0.0), 0) < 0.0:  # tiles of more than one reference
            for i in range(blocks):
                ratio = tl.exp2(_reference(tl.load(sums_ptr + i), z_label) - reference)
                place = i * BLOCK_S + tl.arange(0, BLOCK_S)
                scaled = tl.load(exp_ptr + place, mask=place < S, other=0.0).to(tl.float32) * ratio
                tl.store(exp_ptr + place, scaled.to(exp_ptr.dtype.element_ty), mask=place < S)
        if not FIRST:  # noqa: SIM102 - known to the compiler, `moved` is not
            if moved < 0.0:
                for start in range(0, H, BLOCK_H):
                    h = start + tl.arange(0, BLOCK_H)
                    place_ptr = d_hidden_ptr + row * H + h
                    tl.store(place_ptr, tl.load(place_ptr, mask=h < H, other=0.0) * tl.exp2(moved), mask=h < H)
        tl.debug_barrier()  # the label's is written a second time
        tl.store(exp_ptr + label, 0.0, mask=(label >= 0) & (label < S))

    @triton.jit(do_not_specialize=["C", "V"])
    def _finish_kernel(
        d_hidden_ptr, weight_ptr, labels_ptr, z_label_ptr, state_ptr, row_weights_ptr, divisor_ptr,
        loss_ptr, nll_ptr, entropy_ptr, top1_ptr, out_ptr, C, V, H,
        HAS_ROW_WEIGHTS: tl.constexpr, DFT: tl.constexpr, STATS: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        state_ptr += row
        label, z_label = tl.load(labels_ptr + row).to(tl.int64), tl.load(z_label_ptr + row)
        reference, total = tl.load(state_ptr), tl.load(state_ptr + C)
        # The label's share may be a rounding away from what the tile added: no loss is to come out below 0.
        e_label = tl.exp2(z_label - reference)
        others = total - e_label
        others = tl.where(others < 0.0, 0.0, others)  # `tl.maximum` would hide a NaN
        total = others + e_label
        log_total = tl.log(total)
        nll = log_total + (reference - z_label) * _LN_2
        loss, row_weight = weigh_row(nll, nll, 1.0, row_weights_ptr, row, HAS_ROW_WEIGHTS, DFT)
        share = 1.0 / total  # not times the weight, which of DFT is as small again
        if divisor_ptr is not None:
            row_weight /= tl.load(divisor_ptr)
        tl.store(nll_ptr + row, nll)
        tl.store(loss_ptr + row, loss)
        if STATS:
            tl.store(entropy_ptr + row, log_total - tl.load(state_ptr + 2 * C) * _LN_2 / total)
            top, top_before = tl.load(state_ptr + 3 * C), tl.load(state_ptr + 4 * C)
            tl.store(top1_ptr + row, (z_label >= top - _TIE * tl.abs(top)) & (top_before < top))
        weight_ptr += tl.where((label >= 0) & (label < V), label, 0) * H
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)
            d_hidden = tl.load(d_hidden_ptr + row * H + h, mask=h < H, other=0.0)
            d_hidden -= others * tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32)
            tl.store(out_ptr + row * H + h, (d_hidden * share * row_weight).to(out_ptr.dtype.element_ty), mask=h < H)


# ----------------------------------------------------------------------------------------------------------------------
# Launchers


def has_kernels(device: torch.device, dtype: torch.dtype, weight_VH: Tensor, bias_V: Tensor | None, loss: Loss) -> bool:
    """Whether `frozen_head_chunk` makes this loss on the device, of products in `dtype`."""
    if not kernels_on(device) or (device.type == "cuda" and compute_capability(device) != (9, 0)):
        return False
    if dtype != torch.bfloat16 or not weight_VH.is_contiguous() or not by_tma(weight_VH):
        return False
    return bias_V is None and loss.softcap is None and loss.label_smoothing == 0.0


def slab_columns(vocabulary: int) -> int:
    """S: slabs of even size, of whole tiles. Of few rows as of many: `_join_kernel` is compiled for their number."""
    slabs = cdiv(vocabulary, _MOST_COLUMNS)
    return cdiv(cdiv(vocabulary, slabs), _BLOCK_S) * _BLOCK_S


def chunk_bytes(rows: int, hidden: int, vocabulary: int) -> int:
    """What `frozen_head_chunk` takes for a while: exponentials, their sums, and a product in fp32."""
    columns = slab_columns(vocabulary)
    return rows * (2 * columns + 4 * 3 * (columns // _BLOCK_S) + 4 * hidden)


def frozen_head_chunk(
    hidden_CH: Tensor, weight_VH: Tensor, rows: Rows, loss: Loss, divisor: Tensor | None, d_hidden_CH: Tensor
) -> None:
    """Writes the rows' results and the gradients of hidden_CH, times the rows' weights, over `divisor` (0-d; None: 1)
    and still over `logit_scale`.

    hidden_CH and weight_VH are contiguous and bf16; `has_kernels` has said whether this can be called.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    (C, H), V = hidden_CH.shape, len(weight_VH)
    stats = rows.entropy.numel() > 0
    unit_log2 = loss.logit_scale / math.log(2)
    S = slab_columns(V)
    most_blocks = cdiv(S, _BLOCK_S)
    device = hidden_CH.device
    exp_CS = torch.empty((C, S), dtype=torch.bfloat16, device=device)
    sums, state = torch.empty((2 + stats, C, most_blocks), device=device), torch.empty((5, C), device=device)
    z_label_C, product_CH = torch.empty((C,), device=device), torch.empty((C, H), device=device)
    block_h = min(4096, next_power_of_2(H))
    with torch.cuda.device_of(hidden_CH):
        _label_logits_kernel[(cdiv(C, 64),)](
            hidden_CH, weight_VH, rows.targets, z_label_C, C, V, H, unit_log2, BLOCK=64, BLOCK_H=_BLOCK_H, num_warps=4
        )
        for first_col in range(0, V, S):
            weight_SH = weight_VH[first_col : first_col + S]
            width = len(weight_SH)
            blocks = cdiv(width, _BLOCK_S)
            programs = min(cdiv(C, _BLOCK_C) * blocks, num_multiprocessors(hidden_CH.device))
            _exponentials_kernel[(programs,)](
                TensorDescriptor.from_tensor(hidden_CH, [_BLOCK_C, _BLOCK_H]),
                TensorDescriptor.from_tensor(weight_SH, [_BLOCK_S, _BLOCK_H]),
                TensorDescriptor.from_tensor(exp_CS[:, :width], [_BLOCK_C, _BLOCK_S // 2]),
                z_label_C, sums, C, width, H, unit_log2, blocks, C * blocks, programs, STATS=stats,
                BLOCK_C=_BLOCK_C, BLOCK_S=_BLOCK_S, BLOCK_H=_BLOCK_H,
                num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
            )  # fmt: skip
            _join_kernel[(C,)](
                exp_CS, sums, rows.targets, z_label_C, product_CH, state,
                C, width, H, S, first_col, blocks, C * blocks, FIRST=first_col == 0, STATS=stats,
                BLOCKS=next_power_of_2(most_blocks), BLOCK_S=_BLOCK_S, BLOCK_H=block_h, num_warps=4,
            )  # fmt: skip
            accumulate_product(product_CH, exp_CS[:, :width], weight_SH, beta=int(first_col > 0))
        _finish_kernel[(C,)](
            product_CH, weight_VH, rows.targets, z_label_C, state, rows.weights, divisor,
            rows.loss, rows.nll, rows.entropy, rows.is_top1, d_hidden_CH, C, V, H,
            HAS_ROW_WEIGHTS=rows.weights is not None, DFT=loss.dft, STATS=stats, BLOCK_H=block_h, num_warps=4,
        )  # fmt: skip
