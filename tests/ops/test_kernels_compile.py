"""The kernels compile for real GPUs, on any machine: the interpreter accepts what the compiler does not."""

import os
import subprocess
import sys
from importlib import import_module

import pytest

POINTERS = {
    "targets_ptr": "*i64", "rows_ptr": "*i64", "row_weights_ptr": "*fp32", "loss_ptr": "*fp32", "nll_ptr": "*fp32",
    "entropy_ptr": "*fp32", "top1_ptr": "*i1", "scale_ptr": "*fp32",
}  # fmt: skip
INTEGERS = {"stride", "V", "K", "H"}


def compile_kernel(kernel, target, dtype, constants, num_warps):
    from triton.compiler import ASTSource, compile

    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = POINTERS.get(name, f"*{dtype}" if name.endswith("_ptr") else "fp32")
        if signature[name].startswith("*") or name in ("stride", "H"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = compile(ASTSource(kernel, signature, constants, attributes), target, {"num_warps": num_warps})
    return compiled.asm["ptx"]


def compile_all():
    from triton.backends.compiler import GPUTarget

    head, scale_rows = (import_module(f"truetune.ops.{name}") for name in ("linear_cross_entropy", "scale_rows"))
    flags = ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ROW_WEIGHTS", "SMOOTHING", "DFT", "STATS", "WRITE_GRAD")
    for capability, dtype, on in ((90, "bf16", True), (90, "bf16", False), (80, "fp32", True)):
        target = GPUTarget("cuda", capability, 32)
        constants = dict.fromkeys(flags, on) | {"WRITE_GRAD": True, "STATS": True}
        constants |= {"LANES": 32 * head._NUM_WARPS, "VECTOR": 8 if dtype == "bf16" else 4, "STAGES": head._STAGES}
        if not on:
            constants |= {"bias_ptr": None, "row_weights_ptr": None}
        ptx = compile_kernel(head._cross_entropy_kernel, target, dtype, constants, head._NUM_WARPS)
        assert "ld.global.v4.b32" in ptx, "the logits are not loaded 16 bytes at a time"
        assert "st.global.v4.b32" in ptx, "the gradients are not stored 16 bytes at a time"
        constants = {"HAS_ROWS": on, "BLOCK_K": 1, "BLOCK_H": 4096} | ({} if on else {"rows_ptr": None})
        compile_kernel(scale_rows._scale_rows_kernel, target, dtype, constants, 8)


def test_kernels_compile_for_gpus_with_wide_loads_and_stores():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    compile_all()
