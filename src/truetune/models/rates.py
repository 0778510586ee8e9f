"""How long layers take, estimated from their FLOPs before anything has run, and how fast this GPU multiplies.

T: tokens, H: hidden size, I: intermediate size.
"""

import torch

from truetune.models.plan import Rates
from truetune.models.shapes import LayerShape, ModelShape

# bf16 TFLOP/s that GEMMs of a training step's shapes reach, by a part of the GPU's name, the longest match first. H100
# and H200: measured, 650 to 710 on an 8B model's shapes; the others: the same share of the data sheet's dense rate.
_RATES = {
    "B200": 1500, "B300": 1500, "H200": 680, "H100 PCIe": 450, "H100": 680, "H800": 680, "H20": 120,
    "A100": 250, "A800": 250, "A40": 110, "A10": 70, "A30": 120, "L40S": 220, "L40": 140, "L4": 80,
    "5090": 170, "4090": 130, "3090": 60, "RTX PRO 6000": 300, "RTX 6000": 230, "MI300": 600, "T4": 40, "V100": 90,
}  # fmt: skip
UNKNOWN_GPU = "an H100"
EFFICIENCY = 0.85  # of a step, against its GEMMs and attention alone: norms, adapters, launches
_ATTENTION_EFFICIENCY = 0.5  # FlashAttention-2 against a GEMM
_FP8_GAIN = 1.8


def known_flops(name: str) -> float | None:
    """bf16 FLOP/s of a GPU by its name, or None."""
    matches = sorted((part for part in _RATES if part in name), key=len)
    return _RATES[matches[-1]] * 1e12 if matches else None


def known_host_rate(name: str) -> float:
    """Bytes a second to pinned memory: PCIe 5 gives 50 GB/s (600 MB in 12 ms were measured), PCIe 4 half of it."""
    return 50e9 if any(part in name for part in ("H100", "H200", "B200", "B300", "5090", "RTX PRO")) else 24e9


def measured_flops(device: torch.device, size: int = 8192) -> float:
    """bf16 FLOP/s of a square GEMM on this GPU, after some to warm up."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, a, out=out)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(5):
        torch.mm(a, a, out=out)
    end.record()
    end.synchronize()
    return 5 * 2 * size**3 / (start.elapsed_time(end) / 1e3)


def estimated_rates(
    model: ModelShape,
    tokens: int,
    length: int,
    flops: float,
    *,
    host_rate: float,
    fp8: bool = False,
    host_bytes: int = 0,
) -> Rates:
    """A layer's times for `tokens` in documents of `length`, the mean over all layers."""
    count = max(1, len(model.layers))
    gemm_rate = flops * EFFICIENCY * (_FP8_GAIN if fp8 else 1.0)
    linears = 2 * tokens * model.linear_elements / count / gemm_rate
    query = sum(layer.query for layer in model.layers) / count
    attention = 2 * tokens * length * query / (flops * EFFICIENCY * _ATTENTION_EFFICIENCY)  # causal: half of all pairs
    qkv_out = sum(map(_attention_elements, model.layers)) / count
    mlp_again = sum(map(_mlp_elements_again, model.layers)) / count
    trained = any(layer.trained_mlp for layer in model.layers)
    return Rates(
        forward=linears + attention,
        backward=(2 if trained else 1) * linears + 2.5 * attention,
        recompute=2 * tokens * mlp_again / gemm_rate,
        attention=2 * tokens * qkv_out / gemm_rate + attention,
        host_rate=host_rate,
        host_bytes=host_bytes,
    )


def _attention_elements(layer: LayerShape) -> int:
    return 2 * layer.hidden * (layer.query + layer.key)


def _mlp_elements_again(layer: LayerShape) -> int:
    """Of the weights that an MLP is made again with: gate and up, and all of experts."""
    if layer.other_mlp:
        return layer.linear_elements - _attention_elements(layer)
    return 2 * layer.hidden * layer.intermediate


def head_seconds(model: ModelShape, tokens: int, flops: float) -> float:
    """Of the LM head and its loss, forward and backward: two GEMMs, three where it is trained."""
    return 2 * tokens * model.head * model.hidden * (3 if model.head_gradient else 2) / (flops * EFFICIENCY)
