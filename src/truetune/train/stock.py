"""What a run asks for that leaves it to stock TRL, or its batches padded."""

from typing import Any

from peft import PeftModel

from truetune.models.adapters import base_model


def why_stock_trl(trainer: Any) -> list[str]:
    """What this run asked for that changes models, forwards or ranks in ways of its own; each runs stock TRL."""
    args, accelerator = trainer.args, trainer.accelerator
    parallelism = accelerator.parallelism_config
    sizes = ("cp_size", "sp_size", "tp_size")
    split = [name for name in sizes if parallelism is not None and (getattr(parallelism, name, 1) or 1) > 1]
    kernels = getattr(base_model(trainer.model), "use_kernels", False)
    reasons = {
        "torch_compile": args.torch_compile,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        f"parallelism ({', '.join(split)})": bool(split),
        "use_liger_kernel": args.use_liger_kernel,
        "use_kernels": kernels,
    }
    return [name for name, asked in reasons.items() if asked]


def why_not_unpad(trainer: Any) -> str | None:
    if isinstance(trainer.model, PeftModel) and trainer.model.active_peft_config.is_prompt_learning:
        return "prompt learning puts virtual tokens before each row"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func takes logits in the shape of its own batches"
    if trainer.args.neftune_noise_alpha:
        return "NEFTune scales its noise by the padded length"
    return None
