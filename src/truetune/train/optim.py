"""Parameter groups: embeddings and LoRA's B matrices at learning rates of their own, found by identity."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from truetune.models.adapters import base_model
from truetune.train.errors import TrainError
from truetune.train.stochastic_rounding import StochasticAdamW


@dataclass(frozen=True)
class ParameterGroup:
    """One line of the table that is printed at the start."""

    name: str
    tensors: int
    parameters: int
    learning_rate: float
    weight_decay: float


def embedding_parameters(model: Any) -> list[nn.Parameter]:
    """The trained parameters of the model's input embeddings and LM head, whatever wraps them, LoRA's not included.

    `modules_to_save` copies, `trainable_token_indices` rows and tied weights are found, each once.
    """
    base = base_model(model)
    modules = [base.get_input_embeddings(), base.get_output_embeddings()]
    return _unique(
        parameter
        for module in modules
        if module is not None and not isinstance(module, LoraLayer)
        for parameter in module.parameters()
        if parameter.requires_grad
    )


def lora_b_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained B matrices of all LoRA layers (those of embeddings included)."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return _unique(
        parameter
        for layer in layers
        for parameter in [*layer.lora_B.parameters(), *layer.lora_embedding_B.values()]
        if parameter.requires_grad
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    embedding_learning_rate: float | None = None,
    loraplus_lr_ratio: float | None = None,
) -> list[ParameterGroup]:
    """Moves embeddings and B matrices into groups of their own, weight decay and all else kept; returns the table.

    Call before the first step and before a scheduler is made. Raises `TrainError` where a rate would reach no tensor.
    """
    special: dict[int, tuple[str, float]] = {}
    if loraplus_lr_ratio is not None:
        b_matrices = lora_b_parameters(model)
        if not b_matrices:
            raise TrainError("loraplus_lr_ratio is set, but no LoRA B matrix is trained: remove it or train with LoRA.")
        for parameter in b_matrices:
            special[id(parameter)] = ("lora_B", loraplus_lr_ratio)
    if embedding_learning_rate is not None:
        embeddings = embedding_parameters(model)
        if not embeddings:
            raise TrainError(
                "embedding_learning_rate is set, but no embedding is trained: add embed_tokens and lm_head to "
                "modules_to_save, name trainable_token_indices, train in full, or remove it."
            )
        for parameter in embeddings:
            special[id(parameter)] = ("embeddings", embedding_learning_rate)

    groups, names, moved = [], [], set()
    for group in optimizer.param_groups:
        by_name: dict[str, list[nn.Parameter]] = {"": []}
        for parameter in group["params"]:
            by_name.setdefault(special.get(id(parameter), ("", 0.0))[0], []).append(parameter)
            moved.add(id(parameter))
        rates = {"": group["lr"], "embeddings": embedding_learning_rate}
        rates["lora_B"] = group["lr"] * (loraplus_lr_ratio or 1.0)
        for name, parameters in by_name.items():
            if parameters or not name:
                groups.append({**group, "params": parameters, "lr": rates[name]})
                names.append(name or "others")
    if lost := set(special) - moved:
        raise TrainError(
            f"{len(lost)} tensors with a learning rate of their own are not in the optimizer: "
            "use an optimizer that takes parameter groups, or remove embedding_learning_rate and loraplus_lr_ratio."
        )
    if special:
        optimizer.param_groups[:] = groups
    return [_describe(name, group) for name, group in zip(names, groups, strict=True) if group["params"]]


def stochastic_adamw(args: Any, model: Any) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """What `Trainer.get_optimizer_cls_and_kwargs` gives with `stochastic_rounding`. Raises `TrainError`."""
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise TrainError(
            f"stochastic_rounding is for AdamW, not {optim}: set optim to adamw_torch_fused, or remove it."
        )
    if model is None or not any(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters()):
        raise TrainError("stochastic_rounding has nothing to round, because no bf16 weight is trained: remove it.")
    betas = (args.adam_beta1, args.adam_beta2)
    return StochasticAdamW, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "seed": args.seed}


def _describe(name: str, group: dict) -> ParameterGroup:
    # A 4-bit or sharded tensor's numel is not its size; trainable ones are neither.
    size = sum(parameter.numel() for parameter in group["params"])
    return ParameterGroup(name, len(group["params"]), size, float(group["lr"]), float(group.get("weight_decay", 0.0)))


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())
