"""The architectures whose decoder layers can be fused, one row each, keyed by the layer's class.

A row says how a layer is built, not what it computes: `blocks.py` is written once over the rows. What a row names is
checked on every instance (`fuse.py`), so that a subclass or a patched class is never taken for what it is not.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """One architecture: names are attributes of the decoder layer, of its `self_attn` and of its `mlp`.

    `prefix`: what the architecture's classes begin with, in `transformers.models.<module>.modeling_<module>`.
    `norm_offset`: 1.0 where norms multiply by (1 + weight). `norm_keeps_dtype`: they give their input's dtype, and not
    the wider one of input and weight. `qk_norm`: of each head, of the whole row, or none.
    `qkv`, `gate_up`: three and two projections, or one whose output holds all.
    `window`, `softcap`: where `self_attn` has what it hands to the attention function. Layers whose MLP is not
    `<prefix>MLP` (experts) keep their own.
    """

    prefix: str
    module: str
    norm_offset: float = 0.0
    norm_keeps_dtype: bool = False
    pre_attention_norm: str | None = "input_layernorm"
    post_attention_norm: str | None = None
    pre_mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None
    qk_norm: str | None = None
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"
    residual_multiplier: bool = False
    window: str | None = None
    softcap: str | None = None

    def class_path(self, part: str) -> str:
        return f"transformers.models.{self.module}.modeling_{self.module}.{self.prefix}{part}"


_SANDWICH = {  # a norm before and after both sublayers
    "norm_offset": 1.0,
    "norm_keeps_dtype": True,
    "post_attention_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
    "window": "sliding_window",
}
_ROWS = (
    Family("Llama", "llama"),  # Llama 2 and 3, Yi, SmolLM2
    Family("Mistral", "mistral", window="config.sliding_window"),
    Family("Qwen2", "qwen2", window="sliding_window"),
    Family("Qwen3", "qwen3", qk_norm="head", window="sliding_window"),
    Family("Qwen3Moe", "qwen3_moe", qk_norm="head", window="sliding_window"),
    Family("Gemma2", "gemma2", softcap="attn_logit_softcapping", **_SANDWICH),  # type: ignore[arg-type]
    Family("Gemma3", "gemma3", qk_norm="head", **_SANDWICH),  # type: ignore[arg-type]
    Family(
        "Phi3",
        "phi3",
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        activation="activation_fn",
        window="config.sliding_window",
    ),
    Family("Granite", "granite", residual_multiplier=True),
    Family(
        "Olmo2",
        "olmo2",
        norm_keeps_dtype=True,
        qk_norm="row",
        pre_attention_norm=None,
        post_attention_norm="post_attention_layernorm",
        pre_mlp_norm=None,
        post_mlp_norm="post_feedforward_layernorm",
    ),
    Family("SmolLM3", "smollm3", window="sliding_window"),
)
FAMILIES: dict[str, Family] = {row.class_path("DecoderLayer"): row for row in _ROWS}
NORMS: dict[str, Family] = {row.class_path("RMSNorm"): row for row in _ROWS}


def class_path(module: nn.Module | Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def family_of(layer: nn.Module) -> Family | None:
    """The row of this decoder layer, or None: it is not one that is known."""
    return FAMILIES.get(class_path(layer))
