"""The LM head and the loss in one, bound to one model instance.

T: flattened positions of the batch, K: supervised positions, H: hidden size, V: vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from truetune.models.attention import given_boundaries
from truetune.models.bound import bind
from truetune.models.fuse import TAKES_ROWS
from truetune.ops import frozen_head
from truetune.ops.cross_entropy import Loss
from truetune.ops.linear_cross_entropy import linear_cross_entropy

IGNORE_INDEX = -100
MOST_ROWS = 15 / 16  # of a batch's positions, that the last layer takes out; about where the copies cost what they save


@dataclass
class FusedLossOutput(ModelOutput):
    """What `model(..., fused_loss=True)` returns.

    `loss`: fp32 scalar with gradients, summed over the supervised tokens and divided by `num_items`.
    `stats`: fp32 [4], detached: the number of supervised tokens, and the sums over them of the negative log-likelihood,
    of the entropy and of top-1 hits.
    `nll_K`: fp32 [K], detached: the negative log-likelihood of each supervised token, in the order of the rows.
    `aux_loss`: a mixture of experts' load-balancing loss, unweighted.
    """

    loss: torch.Tensor | None = None
    stats: torch.Tensor | None = None
    nll_K: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def logit_transform(config: Any) -> tuple[float, float | None]:
    """The factor on a family's logits and their softcap, from its (text) configuration."""
    config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if (factor := getattr(config, name, None)) is not None:
            return float(factor), softcap
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite divides, HyperCLOVA X multiplies
        return (float(scaling) if config.model_type == "hyperclovax" else 1 / scaling), softcap
    return 1.0, softcap


def loss_in_slabs(model: Any, dtype: torch.dtype, label_smoothing: float) -> bool:
    """Whether the loss of this model (on the meta device too), of products in `dtype`, holds no logits on this
    machine's GPU."""
    head = model.get_output_embeddings()
    if head.weight.requires_grad or not torch.cuda.is_available():
        return False
    logit_scale, softcap = logit_transform(model.config)
    loss = Loss(logit_scale, softcap, label_smoothing, dft=False)
    device = torch.device("cuda", torch.cuda.current_device())
    cast = torch.empty_like(head.weight, dtype=dtype, device="meta")
    return frozen_head.has_kernels(device, dtype, cast, getattr(head, "bias", None), loss)


def bind_fused_loss(model: Any) -> None:
    """Gives this causal language model (a `PreTrainedModel`) `model(..., labels=, fused_loss=True) -> FusedLossOutput`.

    Labels are unshifted, int64 [B, S]. `loss_rows` (int64 [K], flat positions whose next token is supervised) and
    `num_items` (int or 0-d tensor) save finding and counting them here. Without the flag the forward is the one that
    was there, so generation and TRL's own fused head go on working. Head and backbone are looked up at every call:
    PEFT and FSDP replace them after this.
    """
    # An attribute, not a closure, so that a deep copy calls its own; a name for each binding, so that a second
    # trainer's leads to the first's and not back to itself.
    plain_forward = f"_plain_forward_{sum(name.startswith('_plain_forward') for name in vars(model))}"
    setattr(model, plain_forward, model.forward)
    logit_scale, softcap = logit_transform(model.config)

    def forward(
        self,
        *args,
        fused_loss: bool = False,
        loss_rows: torch.Tensor | None = None,
        num_items: int | torch.Tensor | None = None,
        label_smoothing: float = 0.0,
        loss_type: str = "nll",
        **kwargs,
    ):
        if not fused_loss:
            return getattr(self, plain_forward)(*args, **kwargs)
        labels = kwargs.pop("labels")
        kwargs["use_cache"] = False
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        few_enough = loss_rows is not None and 0 < len(loss_rows) <= MOST_ROWS * labels.numel()
        if few_enough and hasattr(self.base_model, TAKES_ROWS):
            kwargs["loss_rows"] = loss_rows
        with given_boundaries(self.config, kwargs):
            outputs = self.base_model(*args, **kwargs)
        head = self.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)  # PEFT's wrappers do not forward every attribute
        if isinstance(weight, DTensor):  # sharded by FSDP2
            weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
        hidden = outputs.last_hidden_state.to(weight.device)
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).to(weight.device)
        if hidden.shape[:2] != targets.shape:  # the last layer gave the loss's rows alone
            hidden, targets = hidden[0], targets.flatten()[loss_rows]
            loss_rows = torch.arange(len(targets), device=targets.device)
        loss, stats = linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            rows=loss_rows,
            num_items=num_items,
            softcap=softcap,
            logit_scale=logit_scale,
            label_smoothing=label_smoothing,
            loss_type=loss_type,
            ignore_index=IGNORE_INDEX,
            return_stats=True,
        )
        sums = (stats.nll_K.sum(), stats.entropy_K.sum(), stats.is_top1_K.sum().float())
        return FusedLossOutput(
            loss=loss,
            stats=torch.stack([loss.new_full((), stats.nll_K.numel(), dtype=torch.float32), *sums]),
            nll_K=stats.nll_K.detach(),
            aux_loss=_load_balancing_loss(self, outputs, kwargs),
        )

    # The class's signature stays visible: `generate` checks its keyword arguments against it.
    forward.__wrapped__ = type(model).forward  # type: ignore[attr-defined]
    bind(model, "forward", forward)


def _load_balancing_loss(model: Any, outputs: Any, kwargs: dict[str, Any]) -> Any:
    if not kwargs.get("output_router_logits"):
        return None
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    return load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
    )
