"""The norm between the last decoder layer and the LM head, as one kernel.

Transformers' own makes five copies of the residual stream in fp32 in its backward pass: 96 KiB a token of an 8B model,
which for long documents was the peak of the whole step.
"""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from truetune.models.bound import bind, is_bound, is_replaced
from truetune.models.families import NORM_OFFSETS, Family, class_path
from truetune.ops.rms_norm import rms_norm


def final_norms(holder: nn.Module, family: Family) -> list[nn.Module]:
    """The norm of the module that holds the decoder layers, or what PEFT has wrapped in its place to be trained."""
    norm = getattr(holder, "norm", None)
    modules = () if norm is None else norm.modules()
    return [module for module in modules if class_path(module) == family.class_path("RMSNorm")]


def fuse_final_norm(holder: nn.Module, family: Family) -> str | None:
    """Binds it on this instance. Why it is left as it is, or None."""
    norms = final_norms(holder, family)
    if not norms:
        return f"it is a {type(getattr(holder, 'norm', None)).__name__}"
    if any(is_replaced(norm, "forward") and not is_bound(norm, "forward", final_norm_forward) for norm in norms):
        return "its forward was replaced before"
    for norm in norms:
        bind(norm, "forward", final_norm_forward)
    return None


def unfuse_final_norm(model: nn.Module) -> None:
    for module in model.modules():
        if is_bound(module, "forward", final_norm_forward):
            del vars(module)["forward"]


def final_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """[..., H] -> [..., H] in the same dtype; the class's own where weight and stream differ in theirs."""
    weight = self.weight
    if isinstance(weight, DTensor) or weight.dtype != hidden_states.dtype:
        return type(self).forward(self, hidden_states)
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return rms_norm(hidden_states, weight, eps, offset=NORM_OFFSETS[class_path(self)])
