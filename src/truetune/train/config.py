"""`SFTConfig`: TRL's, and the fields that TRL lacks."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """`trl.SFTConfig` with a few more fields; every other field means what it means in TRL.

    embedding_learning_rate: learning rate of input embeddings and LM head where they are trained (full fine-tuning,
        `modules_to_save`, `trainable_token_indices`); None: the learning rate of all others. Usually a fifth to a tenth
        of it beside LoRA.
    loraplus_lr_ratio: learning rate of LoRA's B matrices over that of its A matrices (LoRA+, arXiv:2402.12354);
        None: 1.
    stochastic_rounding: AdamW that rounds updates of weights kept in bf16 up or down at random, so that small ones are
        not lost; for full fine-tuning with bf16 weights, in four bytes a weight less than fp32 weights.
    fuse: run decoder layers of known architectures as fused blocks.
    activation_policy: what of a fused layer is kept for the backward pass: "keep" (nothing is recomputed but norms and
        the activation product), "lean" (the least device memory: what hides behind the compute goes to the host, the
        rest is recomputed), "offload" (nothing is recomputed, what does not fit goes to the host), "auto" (the fastest
        mix that fits), or the path of a plan that a run saved (activation_plan.json). `gradient_checkpointing=False`
        means "keep"; `gradient_checkpointing_kwargs` and `activation_offloading` select TRL's own mechanisms instead.
    cuda_graphs: on a GPU, run all fused layers but the last as CUDA graphs where everything is kept, so that the
        device does not wait for the host. Short packs run beside them, and need room for their activations. Not in
        several processes, with padded batches, with dropout in adapters, or with deterministic algorithms; the report
        says why where there are none.
    rehearse: on a GPU, run the largest batch forward and backward before the first step, so that the plan rests on
        measured memory and what does not fit fails in the first minute. Losses are the same to the bit without.
    preflight: "full" (audit of all data, parity on 1,024 tokens, a rehearsal of the largest batch, an evaluation step,
        a checkpoint with its reload and the export), "quick" (the first 1,000 rows, 192 tokens) or "off": checks before
        the first step, which stop the run with cause and mend.
    preflight_limits: shares at which the audit of the data stops a run, by name (`truetune.proof.supervision.Limits`).
    allow: names of differences between what was asked and what is in effect that are accepted; each error that can be
        allowed gives its name.
    """

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of trained input embeddings and LM head."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of LoRA's B matrices over that of its A matrices."}
    )
    stochastic_rounding: bool = field(
        default=False, metadata={"help": "AdamW whose updates of bf16 weights are rounded at random, and not lost."}
    )
    fuse: bool = field(default=True, metadata={"help": "Run decoder layers of known architectures as fused blocks."})
    activation_policy: str = field(
        default="auto",
        metadata={"help": "What is kept for the backward pass: auto, keep, lean, offload, or a saved plan's path."},
    )
    cuda_graphs: bool = field(default=True, metadata={"help": "Run fused layers as CUDA graphs, on a GPU."})
    rehearse: bool = field(default=True, metadata={"help": "Try the largest batch before the first step, on a GPU."})
    preflight: str = field(default="quick", metadata={"help": "Checks before the first step: full, quick or off."})
    preflight_limits: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Shares at which the audit of the data stops a run."}
    )
    allow: list[str] = field(
        default_factory=list, metadata={"help": "Accepted differences between what was asked and what is in effect."}
    )


def own_setting(args: Any, name: str) -> Any:
    """One of our fields from any `TrainingArguments`: those of TRL and Transformers have our defaults."""
    default = _FIELDS[name].default
    return getattr(args, name, [] if default is MISSING else default)


_FIELDS = {field.name: field for field in fields(SFTConfig)}
