"""The norm between the last decoder layer and the LM head, as one kernel.

Transformers' own has copies of the residual stream in fp32 at once in its backward pass, about 96 KiB a token of an 8B
model with its input, which for long documents was the peak of the whole step.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from truetune.models.bound import bind, is_bound, is_replaced
from truetune.models.families import NORMS, Family, class_path
from truetune.ops.rms_norm import rms_norm


def _norms(holder: nn.Module, family: Family) -> list[nn.Module]:
    """The norm of the module that holds the decoder layers, and what PEFT trains in its place."""
    norm = getattr(holder, "norm", None)
    modules = () if norm is None else norm.modules()
    return [module for module in modules if class_path(module) == family.class_path("RMSNorm")]


def why_not_final_norm(holder: nn.Module, family: Family) -> str | None:
    """Why the norm of this holder of decoder layers is left as it is, or None."""
    norms = _norms(holder, family)
    if not norms:
        return f"it is a {type(holder.norm).__name__}" if hasattr(holder, "norm") else "there is none"
    if any(is_replaced(norm, "forward") and not is_bound(norm, "forward", final_norm_forward) for norm in norms):
        return "its forward was replaced before"
    return None


def fuse_final_norm(holder: nn.Module, family: Family) -> None:
    for norm in _norms(holder, family):
        bind(norm, "forward", final_norm_forward)


def unfuse_final_norm(model: nn.Module) -> None:
    for module in model.modules():
        if is_bound(module, "forward", final_norm_forward):
            del vars(module)["forward"]


def final_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """[..., H] -> [..., H] in the dtype that the class gives; the class's own where it has become another (a
    parametrized or a sharded norm)."""
    family, weight = NORMS.get(class_path(self)), self.weight
    if family is None or isinstance(weight, DTensor):
        return type(self).forward(self, hidden_states)
    dtype = hidden_states.dtype if family.norm_keeps_dtype else torch.promote_types(hidden_states.dtype, weight.dtype)
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return rms_norm(hidden_states, weight, eps, offset=family.norm_offset, out_dtype=dtype)
