"""AdamW for weights that are kept in bf16 alone: their updates are rounded up or down at random, and none is lost.

At usual learning rates most updates of a bf16 weight are smaller than half of its last digit, and rounding to the
nearest drops them. Rounded up with the probability of what is cut off, they arrive on average (Gupta et al., "Deep
Learning with Limited Numerical Precision", arXiv:1502.02551). Four bytes a weight less than fp32 master weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

BUCKET = 2**26  # elements updated at a time, so that their fp32 copies stay small


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) whose bf16 parameters are rounded stochastically.

    The averages are fp32; parameters of other dtypes are rounded to the nearest. The random numbers are a function of
    `seed` and the step: a resumed run and every rank draw the same ones.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            group["step"] += 1
            seed = (self.seed * 1_000_003 + group["step"]) * 1_009 + number
            generators: dict[torch.device, torch.Generator] = {}
            for bucket in _buckets(p for p in group["params"] if p.grad is not None):
                device = bucket[0].device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                self._update(bucket, group, generators[device])
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any], generator: torch.Generator) -> None:
        lr, (beta1, beta2), step = group["lr"], group["betas"], group["step"]
        for parameter in parameters:
            if not self.state[parameter]:
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.float32)
        averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        gradients = [parameter.grad.float() for parameter in parameters]  # type: ignore[union-attr]
        updated = [parameter.to(torch.float32, copy=True) for parameter in parameters]
        torch._foreach_mul_(updated, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, math.sqrt(1 - beta2**step))
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(updated, averages, scales, -lr / (1 - beta1**step))
        for parameter, new in zip(parameters, updated, strict=True):
            parameter.copy_(stochastic_round(new, generator) if parameter.dtype == torch.bfloat16 else new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch casts a state to its parameter's dtype, and averages in bf16 would stand still."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [p for group in self.param_groups for p in group["params"]]
        for index, parameter in enumerate(order):
            for name, value in saved.get(index, {}).items():
                self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one device, of about BUCKET elements together."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > BUCKET
        if bucket and (full or parameter.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 -> bf16: the neighbour above or below, each with the probability that makes the mean right."""
    noise = torch.randint(0, 2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    # The bits of a GPU's NaN, 0x7fffffff, would carry over into those of -0.0, and a broken run look like a sound one.
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)
