"""Tests of an operation run twice: in plain PyTorch, and through the kernels (on a CPU in Triton's interpreter)."""

from importlib import import_module

import numpy as np
import pytest
import torch

from truetune.ops import backend, cross_entropy

head = import_module(
    "truetune.ops.linear_cross_entropy"
)  # the module; `truetune.ops.linear_cross_entropy` is the function


@pytest.fixture(params=["plain", "kernels"])
def device(request, monkeypatch):
    """The device of the tensors; "kernels" prefers a GPU."""
    if request.param == "plain":
        yield "cpu"
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        pytest.importorskip("triton")
        monkeypatch.setattr(backend, "FORCE_KERNELS", True)
        monkeypatch.setattr(cross_entropy, "_NUM_WARPS", 2)  # small tiles, so that a row has several
        _round_in_the_interpreter(monkeypatch)
        with np.errstate(all="ignore"):  # infinities meet in lanes whose results are masked
            yield "cpu"


@pytest.fixture
def any_device() -> str:
    """For what does not depend on the kernels: a GPU, or plain PyTorch on a CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _round_in_the_interpreter(monkeypatch) -> None:
    """Triton 3.9's interpreter truncates fp32 to bf16, and drops a carry to E4M3; a GPU rounds to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncating_cast = interpreter.InterpreterBuilder.cast_impl
    carryless_cast = interpreter.InterpreterBuilder.create_fp_to_fp

    def cast(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return truncating_cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), dtype.scalar)

    def fp_to_fp(self, source, dtype, rounding_mode):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.float8e4nv):
            return carryless_cast(self, source, dtype, rounding_mode)
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), dtype.scalar)

    def values(x):
        bits = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}.get(x.dtype.scalar)
        return x.data if bits is None else torch.from_numpy(x.data.copy()).view(bits).float().numpy()

    def dot(self, a, b, d, *_):
        """Triton 3.9's interpreter multiplies the bits of bf16 and E4M3 as integers."""
        product = np.matmul(values(a), values(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", fp_to_fp)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 rows, so that small tests have several."""
    monkeypatch.setattr(head, "_chunk_rows", lambda *_: 4)


@pytest.fixture
def empty_is_nan(monkeypatch):
    """What `torch.empty` gives holds NaN, so that an element which is not written shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: empty(size, **kwargs).fill_(float("nan")))
