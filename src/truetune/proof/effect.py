"""Asked and in effect: dtypes, LoRA's targets, what is trained, and the parts that the trainer reports."""

import re
from collections import Counter
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from truetune.models.fuse import decoder_layers
from truetune.proof.result import Check


def check_weights(model: nn.Module) -> Check:
    """Bytes by kind; a weight trained in fp16 loses its updates."""
    sizes: Counter[tuple[str, str]] = Counter()
    for parameter in model.parameters():
        kind = "trained" if parameter.requires_grad else "frozen"
        dtype = "4-bit" if type(parameter).__name__ == "Params4bit" else str(parameter.dtype).removeprefix("torch.")
        sizes[kind, dtype] += parameter.numel() * parameter.element_size()
    parts = [f"{kind} {dtype} {size / 2**20:,.1f} MiB" for (kind, dtype), size in sorted(sizes.items())]
    trained = [dtype for kind, dtype in sizes if kind == "trained"]
    mend = ""
    if not trained:
        mend = "no parameter is trained: give a peft_config, or let requires_grad be true"
    elif "float16" in trained:
        mend = "fp16 weights are trained, whose small updates are lost: load them in fp32 or bf16"
    return Check(
        "weights", ", ".join(parts), "something trained, none in fp16", "fail" if mend else "pass", mend=mend,
        allow="trained_fp16" if trained else "",
        details={f"{kind} {dtype}": size for (kind, dtype), size in sizes.items()},
    )  # fmt: skip


def check_targets(model: nn.Module) -> Check | None:
    """Every target of the adapter that is named meets a module; None without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    names = [name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    asked = getattr(config, "target_modules", None)
    missed = []
    if isinstance(asked, list | set | tuple):
        missed = sorted(target for target in asked if not any(_meets(name, target) for name in names))
    layers = decoder_layers(model)
    with_adapter = sum(any(isinstance(module, BaseTunerLayer) for module in layer.modules()) for layer in layers)
    covered = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for parameter in module.get_base_layer().parameters()
    )
    everything = sum(parameter.numel() for parameter in model.get_base_model().parameters())
    shown = asked if isinstance(asked, str) else ", ".join(sorted({name.rpartition(".")[2] for name in asked or []}))
    partly = bool(layers) and with_adapter < len(layers) and not getattr(config, "layers_to_transform", None)
    mend = ""
    if missed:
        mend = f"no module is called {' or '.join(missed)}: name modules of this model, or target_modules: all-linear"
    idle = _trained_in_vain(model)
    if idle and not missed:
        mend = f"the adapter {' and '.join(idle)} is trained and not active, so that nothing reaches it: set_adapter()"
    return Check(
        "adapter targets",
        f"{shown or 'the defaults'}: {len(names)} modules in {with_adapter} of {len(layers)} layers, "
        f"{covered / max(1, everything):.1%} of the parameters"
        + (f"; not found: {', '.join(missed)}" if missed else ""),
        "every name found, and what is trained active",
        "fail" if missed or idle else "warn" if partly else "pass",
        mend=mend or (f"{len(layers) - with_adapter} layers have no adapter" if partly else ""),
        allow="adapter_targets" if missed or idle else "",
        details={"modules": dict(Counter(name.rpartition(".")[2] for name in names)), "missed": missed, "idle": idle},
    )


def _trained_in_vain(model: PeftModel) -> list[str]:
    """Adapters with trained parameters in a layer that does not use them."""
    return sorted({
        name
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in model.peft_config
        if module.disable_adapters or name not in module.active_adapters
        for part in module.adapter_layer_names
        if name in (held := getattr(module, part, {}))
        and any(p.requires_grad for p in ([held[name]] if isinstance(held[name], nn.Parameter) else
                                          held[name].parameters()))
    })  # fmt: skip


def _meets(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or re.fullmatch(target, name) is not None


def check_parts(trainer: Any) -> list[Check]:
    """The lines of the trainer's report. What was set explicitly and cannot be had was an error before."""
    stock = trainer.report.stock
    checks = [
        Check(line.part, line.in_effect + (f" ({line.why})" if line.why else ""), f"asked: {line.asked}",
              "warn" if line.in_effect == "stock TRL" else "pass")
        for line in trainer.report.lines
    ]  # fmt: skip
    if not stock and not any(check.name == "trainer" for check in checks):
        checks.insert(0, Check("trainer", "truetune", "asked: truetune", "pass"))
    return checks
