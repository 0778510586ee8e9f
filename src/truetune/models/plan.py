"""The activation policy: what of each fused layer is kept for the backward pass, recomputed, or put on the host.

keep: what the blocks save stays on the device. lean: gate and up are recomputed, all else goes to the host.
offload: everything goes to the host, nothing is recomputed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from truetune.models.fuse import decoder_layers, layer_forward
from truetune.models.offload import HostMemory

POLICIES = ("auto", "keep", "lean", "offload")


@dataclass
class LayerActivations:
    """What one layer does: `recompute` its MLP in the backward pass; save to `host`, where there is one."""

    index: int
    recompute: bool = False
    host: HostMemory | None = None

    def saving(self) -> AbstractContextManager[None]:
        return nullcontext() if self.host is None or not torch.is_grad_enabled() else self.host.saving(self.index)


def fused_layers(model: nn.Module) -> list[nn.Module]:
    return [
        layer for layer in decoder_layers(model)
        if getattr(vars(layer).get("forward"), "__func__", None) is layer_forward
    ]  # fmt: skip


def set_activations(layers: Sequence[nn.Module], policy: str) -> None:
    """Puts `policy` ("keep", "lean" or "offload") into fused layers. Offloading needs a GPU; a CPU has nowhere to."""
    device = next(layers[0].parameters()).device if layers else torch.device("cpu")
    host = HostMemory(device) if policy != "keep" and device.type == "cuda" else None
    for index, layer in enumerate(layers):
        vars(layer)["activations"] = LayerActivations(index, recompute=policy == "lean", host=host)
