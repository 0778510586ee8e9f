"""`SFTConfig`: TRL's, and the fields that TRL lacks."""

from dataclasses import dataclass, field
from typing import Any

import trl


@dataclass
class SFTConfig(trl.SFTConfig):
    """`trl.SFTConfig` with three more fields; every other field means what it means in TRL.

    embedding_learning_rate: learning rate of input embeddings and LM head where they are trained (full fine-tuning,
        `modules_to_save`, `trainable_token_indices`); None: the learning rate of all others. Usually a fifth to a tenth
        of it beside LoRA.
    loraplus_lr_ratio: learning rate of LoRA's B matrices over that of its A matrices (LoRA+, arXiv:2402.12354);
        None: 1.
    allow: names of differences between what was asked and what is in effect that are accepted; each error that can be
        allowed gives its name.
    """

    embedding_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of trained input embeddings and LM head."}
    )
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "Learning rate of LoRA's B matrices over that of its A matrices."}
    )
    allow: list[str] = field(
        default_factory=list, metadata={"help": "Accepted differences between what was asked and what is in effect."}
    )


def own_setting(args: Any, name: str) -> Any:
    """One of our fields from any `TrainingArguments`: those of TRL and Transformers have our defaults."""
    return getattr(args, name, [] if name == "allow" else None)
