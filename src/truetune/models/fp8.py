"""Frozen linears in FP8: a model's layers keep their weights as E4M3, and adapters train on top of them.

Both of a weight's layouts (`truetune.ops.fp8`) together take as much memory as bf16; what FP8 buys is GEMMs of twice
the rate. Embeddings and the head keep their dtype.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from truetune.models.errors import ModelError
from truetune.ops.fp8 import Fp8Weight, frozen_fp8_linear, why_not_fp8, why_not_fp8_shape

_PARTS = tuple(part.name for part in fields(Fp8Weight))


class Fp8Linear(nn.Linear):
    """A frozen linear whose weight is `weight8_NK`, `scale_1N`, `weight8_KN` and `scale_1K`.

    It is an `nn.Linear`, so that PEFT wraps it like any other ("all-linear" too), and PEFT makes adapters in its
    `compute_dtype`. The parts are frozen parameters and no buffers: DDP would broadcast buffers in every forward pass.
    """

    def __init__(self, weight: Fp8Weight, bias: nn.Parameter | None, compute_dtype: torch.dtype):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = weight.weight8_NK.shape
        self.compute_dtype = compute_dtype
        for name in _PARTS:
            self.register_parameter(name, nn.Parameter(getattr(weight, name), requires_grad=False))
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Fp8Linear":
        """Raises `ModelError` where the device or the shape has no FP8 product."""
        weight_NK = linear.weight.detach()
        reason = why_not_fp8(weight_NK.device) or why_not_fp8_shape(linear.in_features, linear.out_features)
        if reason:
            raise ModelError(reason)
        return cls(Fp8Weight.quantize(weight_NK), linear.bias, weight_NK.dtype).train(linear.training)

    @property
    def fp8_weight(self) -> Fp8Weight:
        return Fp8Weight(*(self._parameters[name] for name in _PARTS))  # type: ignore[arg-type]

    @property
    def weight(self) -> "_WeightIsFp8":  # type: ignore[override]
        weight8_NK = self.fp8_weight.weight8_NK
        return _WeightIsFp8(weight8_NK.device, self.compute_dtype, weight8_NK.shape)

    def dequantized(self) -> Tensor:
        """weight_NK as the forward product sees it, in `compute_dtype`."""
        return self.fp8_weight.dequantize(self.compute_dtype)

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return frozen_fp8_linear(input, self.fp8_weight, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp8Linear":
        """Moves the parts as bytes: `.to(dtype)` is for what has a dtype to choose."""
        parts = [self._parameters[name] for name in _PARTS]

        def move(tensor: Tensor) -> Tensor:
            if any(tensor is part for part in parts):
                return fn(tensor.view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        return super()._apply(move, recurse)


@dataclass(frozen=True)
class _WeightIsFp8:
    """In the place of an FP8 layer's `weight`, for code that asks where it is and what adapters beside it should be."""

    device: torch.device
    dtype: torch.dtype
    shape: torch.Size

    def __getattr__(self, name: str):
        raise AttributeError(
            "a weight in FP8 cannot be read or written as a tensor, so nothing can be merged into it: "
            "load the model in bf16 and put the adapter on that."
        )


@dataclass
class Fp8Report:
    """What `replace_linears_with_fp8` did. `replaced`: how many linears. `left`: which other linears and experts stayed
    as they were, by name, and why; those that were to be skipped are not among them."""

    replaced: int = 0
    left: dict[str, str] = field(default_factory=dict)

    @property
    def in_effect(self) -> str:
        return f"{self.replaced} linears in FP8" + (f", {len(self.left)} modules as they were" if self.left else "")

    @property
    def reasons(self) -> list[str]:
        kinds: dict[str, Counter[str]] = {}
        for name, why in self.left.items():
            kinds.setdefault(why, Counter())[_kind(name)] += 1
        return [f"{', '.join(f'{n} {kind}' for kind, n in counts.items())}: {why}" for why, counts in kinds.items()]


def _kind(name: str) -> str:
    """ "model.layers.0.mlp.up_proj" -> "up_proj"; "layers.0.mlp.2" -> "mlp"."""
    return next((part for part in reversed(name.split(".")) if not part.isdigit()), name)


def replace_linears_with_fp8(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> Fp8Report:
    """Replaces this model's linears by `Fp8Linear`, one by one, each one's weight freed before the next is made.

    `skip`: names, whole or last parts, of linears to leave. Also left are subclasses of `nn.Linear`, shapes that the
    GEMMs cannot take, and experts whose weights are one tensor; the report names them, and is kept as the model's
    `fp8_report`. Raises `ModelError` where the device has no FP8 or nothing was replaced.
    """
    report = Fp8Report()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:  # not modules: a list of them would keep every weight alive
        parent_name, _, child_name = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if {name, child_name} & set(skip):
            continue
        if type(linear) is not nn.Linear:
            report.left[name] = f"{type(linear).__name__} is no plain nn.Linear"
        elif reason := why_not_fp8_shape(linear.in_features, linear.out_features):
            report.left[name] = reason.partition(":")[0]
        else:
            setattr(model.get_submodule(parent_name), child_name, Fp8Linear.from_linear(linear))
            report.replaced += 1
    for name, module in model.named_modules():
        if _holds_experts(module):
            report.left[name] = f"{type(module).__name__} is no nn.Linear"
    if not report.replaced:
        raise ModelError(f"no linear of {type(model).__name__} could be made FP8: load it in bf16 or nf4.")
    model.fp8_report = report  # type: ignore[assignment]
    return report


def _holds_experts(module: nn.Module) -> bool:
    """Whether it has the matrices of all experts in one tensor."""
    if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):  # whose kernels are such tensors too
        return False
    return any(parameter.dim() == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False))


def check_adapter_on_fp8(model: Any, adapter: Any) -> None:
    """Raises `ModelError` for what a `peft.LoraConfig`, or that of a `PeftModel`, wants of FP8 weights in vain."""
    adapters = [adapter] if adapter is not None else list(getattr(model, "peft_config", {}).values())
    for config in adapters if getattr(model, "fp8_report", None) is not None else []:
        if getattr(config, "use_dora", False):
            raise ModelError(
                "DoRA trains norms of weights, and those in FP8 are frozen: set use_dora=False, or use bf16."
            )
        saved = tuple(getattr(config, "modules_to_save", None) or ())
        for name, module in model.named_modules():
            if name.endswith(saved) and any(isinstance(part, Fp8Linear) for part in module.modules()):
                raise ModelError(
                    f"modules_to_save trains {name}, whose weights are in FP8 and frozen: leave it out, or use bf16."
                )
