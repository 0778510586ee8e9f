"""LoRA through PEFT, with the adapter cast to the activation's dtype and never the activation to the adapter's.

Adapters stay in fp32, because at usual learning rates half of the updates of a bf16 adapter round away. PEFT then
copies every activation to fp32; here the two small matrices are cast instead.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from truetune.models.bound import bind, is_bound, is_replaced


def base_model(model: Any) -> Any:
    """The Transformers model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embedding_rows(model: Any) -> int:
    """How many token ids the model knows; a resized embedding has its rows here too."""
    return base_model(model).config.get_text_config().vocab_size


@dataclass
class AdapterReport:
    """What `cast_adapters_to_activations` did: how many LoRA layers, and those left to PEFT with the reason."""

    replaced: int = 0
    left: dict[str, str] = field(default_factory=dict)


def cast_adapters_to_activations(model: nn.Module) -> AdapterReport:
    """Binds `lora_linear_forward` to every plain LoRA linear of this model; all others keep PEFT's forward."""
    report = AdapterReport()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if is_bound(module, "forward", lora_linear_forward):
            report.replaced += 1  # by an earlier trainer
        elif is_replaced(module, "forward"):
            report.left[name] = "its forward was replaced before"
        elif type(module).__name__ not in ("Linear", "Linear4bit", "Linear8bitLt"):
            report.left[name] = f"it is a {type(module).__name__}"
        else:
            bind(module, "forward", lora_linear_forward)
            report.replaced += 1
    return report


def lora_linear_forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """base(x) + sum over active adapters of scaling * B(A(dropout(x))), computed in x's dtype.

    Which adapters are active, merged or disabled is read at every call; what is not plain LoRA goes to PEFT.
    """
    plain = not (self.disable_adapters or self.merged or args or kwargs)
    active = [name for name in self.active_adapters if name in self.lora_A]
    if not plain or any(name in self.lora_variant for name in active):
        return type(self).forward(self, x, *args, **kwargs)
    result = self.base_layer(x)
    for name in active:
        lora_A, lora_B = self.lora_A[name], self.lora_B[name]
        down = nn.functional.linear(self.lora_dropout[name](x), lora_A.weight.to(x.dtype))
        bias = None if lora_B.bias is None else lora_B.bias.to(down.dtype)
        up = nn.functional.linear(down, lora_B.weight.to(down.dtype), bias)
        result = result + (up * self.scaling[name]).to(result.dtype)
    return result


def adapters_in_fp32(model: nn.Module, before: dict[str, torch.Tensor]) -> int:
    """Restores to fp32 the trainable parameters that were cast to half precision; returns how many.

    `before`: the trainable tensors by name as they were, where they existed; others are widened.
    """
    restored = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            kept = before.get(name)
            parameter.data = parameter.data.float() if kept is None else kept.float().to(parameter.device)
            restored += 1
    return restored
