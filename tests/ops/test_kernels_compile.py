"""The kernels compile for real GPUs, on any machine: the interpreter accepts what the compiler does not.

A kernel is a row of `kernels()`. What its arguments are is read off their names: `*_ptr` points to the dtype of the
target unless `POINTERS` knows better or the name ends in 8 (FP8); `*_desc` are tiles that come by TMA; `*stride` and
`WIDTHS` are integers that 16 divides, `COUNTS` are any integers; the rest are floats.
"""

import os
import re
import subprocess
import sys
from importlib import import_module
from typing import Any, NamedTuple

import pytest

from truetune.ops.backend import next_power_of_2

TARGETS = {75: "fp16", 80: "bf16", 86: "bf16", 89: "bf16", 90: "bf16", 100: "bf16"}  # bf16 begins with 80
SHARED_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}  # what one program may have
FP8_FROM = 89

POINTERS = {
    "targets_ptr": "*i64", "rows_ptr": "*i64", "row_weights_ptr": "*fp32", "loss_ptr": "*fp32", "nll_ptr": "*fp32",
    "entropy_ptr": "*fp32", "top1_ptr": "*i1", "scale_ptr": "*fp32", "rstd_ptr": "*fp32",
    "dx_parts_ptr": "*fp32", "db_parts_ptr": "*fp32", "db_ptr": "*fp32",
    "dweight_ptr": "*fp32", "dgate_scale_ptr": "*fp32", "dup_scale_ptr": "*fp32", "packed_ptr": "*u8",
    "absmax_ptr": "*u8", "code_ptr": "*fp32", "absmax_code_ptr": "*fp32", "absmax_absmax_ptr": "*fp32",
    "offset_ptr": "*fp32", "adapter_ptr": "*fp32", "labels_ptr": "*i64", "z_label_ptr": "*fp32", "sums_ptr": "*fp32",
    "state_ptr": "*fp32", "d_hidden_ptr": "*fp32", "divisor_ptr": "*fp32", "parts_ptr": "*fp32",
    **dict.fromkeys([f"matrix{i}_ptr" for i in range(6)], "*fp32"),
    **dict.fromkeys([f"{side}{i}_scale_ptr" for side in "ab" for i in range(3)], "*fp32"),
}  # fmt: skip
COUNTS = {
    "V", "K", "T", "C", "S", "first_col", "blocks", "size", "num_pairs", "programs", "rows", "dx_parts", "db_parts",
    "dx_blocks", *(f"end{i}" for i in range(6)),
}  # fmt: skip
WIDTHS = {"H", "N", "K0", "K1", "K2", "K3", "width", "span", "dx_size", "db_size"}


class Kernel(NamedTuple):
    module: str  # in truetune.ops
    name: str
    num_warps: int
    constants: dict[str, Any]  # the constexpr arguments; None for a pointer that is not given
    dtype: str | None = None  # of the pointers, where it is not the target's own
    wide: bool = True  # every load and store of a tile moves 16 bytes a thread, if 16 divides what it should
    targets: range = range(1000)  # that have it
    num_stages: int = 3  # Triton's default


def kernels() -> list[Kernel]:
    return [*of_the_head(), *of_a_frozen_head(), *of_activations(), *of_norms(), *of_rope(), *of_linears()]


def of_the_head() -> list[Kernel]:
    cross_entropy = import_module("truetune.ops.cross_entropy")
    flags = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ROW_WEIGHTS", "SMOOTHING", "DFT")
    tile = {
        "STATS": True,
        "WRITE_GRAD": True,
        "LANES": 32 * cross_entropy._NUM_WARPS,
        "VECTOR": 8,
        "STAGES": cross_entropy._STAGES,
    }
    loss, loss_warps = ("cross_entropy", "_cross_entropy_kernel"), cross_entropy._NUM_WARPS
    every, none = dict.fromkeys(flags, True), dict.fromkeys(flags, False) | {"bias_ptr": None, "row_weights_ptr": None}
    rows = {"BLOCK_K": 1, "BLOCK_H": 4096}
    return [
        Kernel(*loss, loss_warps, tile | every),
        Kernel(*loss, loss_warps, tile | none),
        Kernel(*loss, loss_warps, tile | every | {"VECTOR": 4}, dtype="fp32"),
        *(Kernel("rows", "_put_rows_kernel", 8, rows | {"ADD": False}, dtype=dtype) for dtype in (None, "fp32")),
        Kernel("rows", "_put_rows_kernel", 8, rows | {"ADD": False, "rows_ptr": None}),
        *(Kernel("rows", "_put_rows_kernel", 8, rows | {"ADD": add, "scale_ptr": None}) for add in (False, True)),
    ]


def of_a_frozen_head() -> list[Kernel]:
    module = import_module("truetune.ops.frozen_head")
    tile = {"BLOCK_C": module._BLOCK_C, "BLOCK_S": module._BLOCK_S, "BLOCK_H": module._BLOCK_H}
    row = {"BLOCKS": 256, "BLOCK_S": module._BLOCK_S, "BLOCK_H": 4096}
    every = {"HAS_ROW_WEIGHTS": True, "DFT": True, "STATS": True, "BLOCK_H": 4096}
    common = {"wide": False, "targets": range(90, 91)}
    return [
        Kernel("frozen_head", "_label_logits_kernel", 4, {"BLOCK": 64, "BLOCK_H": module._BLOCK_H}, **common),
        *(
            Kernel(
                "frozen_head",
                "_exponentials_kernel",
                module._NUM_WARPS,
                tile | {"STATS": stats},
                num_stages=module._NUM_STAGES,
                **common,
            )
            for stats in (False, True)
        ),
        *(
            Kernel("frozen_head", "_join_kernel", 4, row | {"FIRST": first, "STATS": stats}, **common)
            for first in (False, True)
            for stats in (False, True)
        ),
        *(Kernel("frozen_head", "_finish_kernel", 4, every, dtype=dtype, **common) for dtype in (None, "fp32")),
    ]


def of_activations() -> list[Kernel]:
    fp8 = dict.fromkeys(("dgate8_ptr", "dup8_ptr", "dgate_scale_ptr", "dup_scale_ptr"))
    return [
        *(
            Kernel("swiglu", name, 4, {"ACTIVATION": activation, "BLOCK": 1024, "QUANTIZE": False} | without)
            for activation in ("silu", "gelu_tanh", "gelu")
            for name, without in (
                ("_glu_forward_kernel", {"act8_ptr": None, "scale_ptr": None}),
                ("_glu_backward_kernel", fp8 | {"RECOMPUTE": True, "ONE_SCALE": True}),
                ("_glu_backward_kernel", fp8 | {"RECOMPUTE": False, "ONE_SCALE": True, "act_ptr": None}),
            )
        ),
        Kernel("swiglu", "_glu_forward_kernel", 8, {"ACTIVATION": "silu", "BLOCK": 2048, "QUANTIZE": True}),
        *(
            Kernel(
                "swiglu",
                "_glu_backward_kernel",
                8,
                {"ACTIVATION": "silu", "BLOCK": 2048, "QUANTIZE": True, "RECOMPUTE": True, "ONE_SCALE": one_scale},
            )
            for one_scale in (False, True)
        ),
        *(  # 8 bytes are 8 elements of FP8
            Kernel("fp8", "_quantize_rows_kernel", 16, {"POWERS_OF_TWO": weights, "BLOCK": 4096}, wide=False)
            for weights in (False, True)
        ),
        Kernel("dropout", "_seeded_dropout_kernel", 4, {"BLOCK_K": 1024, "HAS_ADD": True}),
    ]


def of_norms() -> list[Kernel]:
    norm, d_norm = ("rms_norm", "_rms_norm_forward_kernel"), ("rms_norm", "_rms_norm_backward_kernel")
    no_fp8 = {"y8_ptr": None, "scale_ptr": None}
    plain = no_fp8 | {"added_ptr": None, "residual_ptr": None, "sum_ptr": None}
    frozen = dict.fromkeys(("dy_b_ptr", "dy_c_ptr", "dresidual_ptr", "dweight_ptr"))
    return [
        *(Kernel(*norm, *tile_of_rows(H, 2048, plain)) for H in (64, 1024, 16384)),
        Kernel(*norm, *tile_of_rows(4096, 2048, no_fp8)),
        Kernel(*norm, *tile_of_rows(4096, 2048, {})),
        Kernel(*d_norm, *tile_of_rows(4096, 2048, frozen)),
        *(Kernel(*d_norm, *tile_of_rows(H, 4096, {})) for H in (128, 1024, 16384)),
    ]


def of_rope() -> list[Kernel]:
    rope, d_rope = ("rope", "_rope_forward_kernel"), ("rope", "_rope_backward_kernel")
    no_norms = {"q_weight_ptr": None, "k_weight_ptr": None}
    no_norm_grads = no_norms | {"dweight_ptr": None}
    return [
        Kernel(*rope, *tiles_of_heads(32, 8, 128, 128, False, no_norms)),
        Kernel(*rope, *tiles_of_heads(64, 8, 128, 128, False, {})),
        Kernel(*rope, *tiles_of_heads(28, 4, 96, 72, False, no_norms), wide=False),
        Kernel(*d_rope, *tiles_of_heads(32, 8, 128, 128, True, no_norm_grads)),
        Kernel(*d_rope, *tiles_of_heads(64, 8, 128, 128, True, {"dweight_ptr": None})),
        Kernel(*d_rope, *tiles_of_heads(16, 8, 128, 128, True, {})),
        Kernel(*d_rope, *tiles_of_heads(16, 8, 256, 64, True, {})),
    ]


def outer(ranks: list[int], *, normed: bool, by_rank: bool = True) -> dict[str, Any]:
    module = import_module("truetune.ops.low_rank")
    missing = range(len(ranks), 4)
    return {
        "BY_RANK": by_rank, "BLOCK_R0": ranks[0], "BLOCK_R": max(16, *ranks), "BLOCK_K": module._OUTER_K,
        "BLOCK_T0": module.outer_rows(2), "BLOCK_T": module.outer_rows(2),
        **{f"RANKS{i}": rank for i, rank in enumerate(ranks)},
        **dict.fromkeys([f"RANKS{i}" for i in missing], 0),
        **dict.fromkeys([f"{name}{i}_ptr" for i in missing for name in "dx"]),
        **({} if normed else {"rstd_ptr": None, "weight_ptr": None}),
    }  # fmt: skip


def of_linears() -> list[Kernel]:
    module = import_module("truetune.ops.low_rank")
    low_rank = {"BLOCK_T": 32, "BLOCK_N": 128, "add1_ptr": None, "add2_ptr": None}
    d_low_rank = {"BLOCK_T": module._BACKWARD_T, "BLOCK_N": module._BACKWARD_N}
    project = {"BLOCK_T": module._PROJECT_T, "BLOCK_K": module._PROJECT_K}
    nf4 = {"BLOCK_SIZE": 64, "NESTED_SIZE": 256, "PAIRS": 2048}
    plain_nf4 = dict.fromkeys(("absmax_code_ptr", "absmax_absmax_ptr", "offset_ptr"))
    return [
        *(
            Kernel(
                "low_rank",
                "_low_rank_product_kernel",
                4,
                low_rank | {"RANK": rank, "BLOCK_R": min(64, rank), "ADDS": 1},
            )
            for rank in (16, 64, 256)
        ),
        *(
            Kernel(
                "low_rank",
                "_low_rank_backward_kernel",
                module._BACKWARD_WARPS,
                d_low_rank | {"RANK": rank, "BLOCK_R": max(16, rank)},
                targets=range(target, target + 1),
                num_stages=module.backward_stages(divmod(target, 10), rank),
            )
            for rank in (8, 16, 32)
            for target in TARGETS
            if target >= 80
        ),
        Kernel("low_rank", "_sum_parts_kernel", 4, {"BLOCK": 1024}),
        *(
            Kernel("low_rank", name, 4, constants, wide=False, targets=range(90, 91))
            for ranks in (16, 64)
            for name, constants in (
                ("_project_kernel", project | {"RANKS": ranks, "BLOCK_R": ranks}),
                ("_outer_kernel", outer([ranks], normed=False, by_rank=False)),
                ("_outer_kernel", outer([ranks], normed=True)),
                ("_outer_kernel", outer([ranks, 16, ranks, ranks], normed=True)),
            )
        ),
        *(
            Kernel(
                "fp8_sum",
                "_fp8_sum_kernel",
                8,
                sum_of_products(products, rank, add, by_rank),
                wide=False,
                targets=range(90, 91),
            )
            for products in (1, 2, 3)
            for rank, by_rank in ((0, False), (8, False), (16, True), (48, True), (64, False), (64, True), (256, True))
            for add in (False, True)
        ),
        *(
            Kernel(
                "dense_sum",
                "_dense_sum_kernel",
                8,
                dense_sum(products, rank, by_k, flat),
                wide=False,
                targets=range(90, 91),
                num_stages=import_module("truetune.ops.dense_sum").num_stages(flat),
            )
            for products, flat in ((1, True), (1, False), (2, False), (3, False))
            for rank in ((0, 32) if flat else (16, 256))
            for by_k in (False, True)
        ),
        *(
            Kernel("rounding", "_round_kernel", 4, {"MATRICES": matrices, "BLOCK": 1024}, wide=False)
            for matrices in range(1, 7)
        ),
        Kernel("nf4", "_dequantize_kernel", 8, nf4 | {"NESTED": True}, wide=False),
        Kernel("nf4", "_dequantize_kernel", 8, nf4 | plain_nf4 | {"NESTED": False}, wide=False),
    ]


def tile_of_rows(H: int, elements: int, absent: dict[str, None]) -> tuple[int, dict[str, Any]]:
    """The warps and the constants of the kernels of `rms_norm`."""
    rows, block_h, num_warps = import_module("truetune.ops.rms_norm")._tile(H, elements)
    return num_warps, {"ROWS": rows, "BLOCK_H": block_h, **absent}


def tiles_of_heads(
    heads: int, key_heads: int, D: int, R: int, backward: bool, absent: dict[str, None]
) -> tuple[int, dict[str, Any]]:
    """The warps and the constants of the kernels of `rope`."""
    module = import_module("truetune.ops.rope")
    tiles = module._tiles(heads, key_heads, D, R, *(module.elements_backward(heads) if backward else (32,))) | absent
    return tiles.pop("num_warps"), tiles


def sum_of_products(products: int, rank: int, add: bool, by_rank: bool) -> dict[str, Any]:
    """The constants of the kernel of `fp8_sum`."""
    module = import_module("truetune.ops.fp8_sum")
    tile = {"BLOCK_T": module._BLOCK_T, "BLOCK_N": module._BLOCK_N, "BLOCK_K": module._BLOCK_K}
    tile["BLOCK_R"] = min(module._LARGEST_BLOCK_R, max(16, next_power_of_2(rank)))
    absent = [f"{side}{i}_{what}" for i in range(products, 3) for side in "ab" for what in ("desc", "scale_ptr")]
    absent += ["x_desc", "adapter_desc"] * (rank == 0) + ["add_desc"] * (not add)
    flags = {"PRODUCTS": products, "RANK": rank, "ADAPTER_BY_RANK": by_rank, "HAS_ADD": add}
    flags |= {"GROUP": module._GROUP, "FLATTEN": products == 1 and rank <= tile["BLOCK_R"]}
    return tile | flags | dict.fromkeys(absent)


def dense_sum(products: int, rank: int, by_k: bool, flat: bool) -> dict[str, Any]:
    """The constants of the kernel of `dense_sum`, with an addend."""
    module = import_module("truetune.ops.dense_sum")
    tile = {f"BLOCK_{letter}": getattr(module, f"_BLOCK_{letter}") for letter in "TNK"}
    tile["BLOCK_R"] = min(module._LARGEST_BLOCK_R, max(16, next_power_of_2(rank)))
    absent = [f"{side}{i}_desc" for i in range(products, 3) for side in "ab"]
    absent += ["x_desc", "adapter_desc"] * (rank == 0)
    flags = {"PRODUCTS": products, "RANK": rank, "BY_K": by_k, "ADAPTER_BY_RANK": by_k, "HAS_ADD": True}
    return tile | flags | {"GROUP": module._GROUP, "FLATTEN": flat} | dict.fromkeys(absent)


def tile_type(name: str, constants: dict[str, Any]) -> str:
    """The type of a `*_desc` of the kernels of `frozen_head`, `fp8_sum` and `dense_sum`."""
    if "BLOCK_S" in constants:
        C, S, H = (constants[f"BLOCK_{letter}"] for letter in "CSH")
        shape = {"hidden_desc": (C, H), "weight_desc": (S, H), "exp_desc": (C, S // 2)}[name]
        return f"tensordesc<bf16[{shape[0]},{shape[1]}]>"
    T, N, K, R = (constants[f"BLOCK_{letter}"] for letter in "TNKR")
    if name[0] in "ab" and name[1] in "012":
        dtype = "bf16" if "BY_K" in constants else "fp8e4nv"
        b = (K, N) if constants.get("BY_K") else (N, K)
        rows, columns = (T, K) if name[0] == "a" else b
        return f"tensordesc<{dtype}[{rows},{columns}]>"
    adapter = (R, N) if constants["ADAPTER_BY_RANK"] else (N, R)
    rows, columns = {"x_desc": (T, R), "adapter_desc": adapter}.get(name, (T, N // 2))
    return f"tensordesc<bf16[{rows},{columns}]>"


def compile_kernel(row: Kernel, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if capability not in row.targets:
        return
    kernel = getattr(import_module(f"truetune.ops.{row.module}"), row.name)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in row.constants:
            signature[name] = "constexpr"
            continue
        if name.endswith("_desc"):
            signature[name] = tile_type(name, row.constants)
        elif name.endswith("8_ptr"):
            signature[name] = "*fp8e4nv"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name, f"*{row.dtype or TARGETS[capability]}")
        elif name.endswith("stride") or name in WIDTHS | COUNTS:
            signature[name] = "i32"
        elif name == "seed":
            signature[name] = "i64"
        else:
            signature[name] = "fp32"
        if name not in COUNTS | {"seed"} and signature[name] != "fp32" and not name.endswith("_desc"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    if "*fp8e4nv" in signature.values() and capability < FP8_FROM:
        return
    source = ASTSource(kernel, signature, row.constants, attributes)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
    compiled = compile(source, GPUTarget("cuda", capability, 32), options)
    where = f"{row.name} on sm{capability} with {row.constants}"
    assert compiled.metadata.shared <= SHARED_KIB[capability] * 1024, f"{where}: {compiled.metadata.shared} bytes"
    if row.wide:
        for access in ("ld", "st"):
            pattern = rf"{access}\.global\S*\.(v4\.b32|v8\.b32|v2\.b64)"
            assert re.search(pattern, compiled.asm["ptx"]), f"{where}: no {access} of 16 bytes"


@pytest.mark.parametrize("capability", TARGETS)
def test_kernels_compile_and_fit(capability):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, __file__, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    for row in kernels():
        compile_kernel(row, int(sys.argv[1]))
