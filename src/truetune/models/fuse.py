"""`fuse(model)`: decoder layers of known architectures run as the blocks of `blocks.py`, on one model instance.

Each layer's forward is bound anew; the class, the modules and their parameters stay. What a layer is gets checked when
it is fused (classes and configuration) and what its parts are at every call (adapters active, disabled or merged, LoRA
dropout, hooks): a part that is not what the blocks compute runs as Transformers and PEFT have it, and is reported.
"""

import functools
import logging
import operator
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from truetune.models.adapters import base_model, lora_linear_forward
from truetune.models.attention import ATTENTION_NAME
from truetune.models.blocks import GatedMlp, Norm, QkvProjection, ResidualProjection
from truetune.models.bound import bind, is_bound, is_replaced
from truetune.models.families import Family, class_path, family_of
from truetune.models.final_norm import fuse_final_norm, unfuse_final_norm, why_not_final_norm
from truetune.models.fp8 import Fp8Linear
from truetune.models.walks import bind_walks, unbind_walks
from truetune.ops.lora import DenseWeight, Linear, Nf4Weight, QuantizedWeight
from truetune.ops.swiglu import Activation

logger = logging.getLogger(__name__)

ACTIVATIONS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}
# By their whole names: other kinds of adapters have classes of the same short ones.
_LORA_LINEARS = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit"}
_NF4_LINEAR = "bitsandbytes.nn.modules.Linear4bit"
GRAPHS = "graphs"  # the attribute of layers that may run as CUDA graphs (`graphs.py`)
TAKES_ROWS = "takes_loss_rows"  # the attribute of a last layer, and of its model, that gives only the loss's rows
_CHECKPOINTED_BY_CALL = "__call__" in vars(GradientCheckpointingLayer)  # Transformers 5.17; later ones wrap `forward`
_CAPTURES_OUTPUTS = "transformers.utils.output_capturing"  # its hooks stay once `output_hidden_states` was asked for


class NotFusable(Exception):
    """Why a part of a layer runs as Transformers and PEFT have it."""


@dataclass
class FusionReport:
    """`fused`: layers whose forward is ours, by class. `final_norm`: whether its is. `left`: why other layers, or parts
    of fused ones, are not."""

    fused: Counter[str] = field(default_factory=Counter)
    final_norm: bool = False
    left: Counter[str] = field(default_factory=Counter)

    @property
    def in_effect(self) -> str:
        layers = sum(self.fused.values())
        norm = " and the final norm" if self.final_norm else ""
        return f"{layers} layers ({', '.join(self.fused)}){norm}" if layers else "none"

    @property
    def reasons(self) -> list[str]:
        return [f"{count} times {why}" if count > 1 else why for why, count in self.left.items()]


def fuse(model: nn.Module) -> FusionReport:
    """Binds the fused forward to every decoder layer of this instance that is known, and to the norm behind the last
    one; all others stay as they are.

    Fusing a model twice changes nothing. `unfuse` undoes it.
    """
    report = FusionReport()
    layers = decoder_layers(model)
    if not layers:
        name = type(base_model(model)).__name__
        report.left[f"{name} is not an architecture that is fused: at most its attention, head and LoRA are ours"] += 1
    for layer in layers:
        name = type(layer).__name__
        family = family_of(layer)
        if family is None:
            report.left[f"{name} is not an architecture that is fused"] += 1
        elif is_replaced(layer, "forward") and not is_bound(layer, "forward", layer_forward):
            report.left[f"{name}: its forward was replaced before"] += 1
        elif reason := _why_not_layer(layer, family):
            report.left[f"{name}: {reason}"] += 1
        else:
            bind(layer, "forward", layer_forward)
            report.fused[name] += 1
            for part, why in parts_left(layer, family).items():
                report.left[f"{part} of {name}: {why}"] += 1
    family = family_of(layers[-1]) if layers else None
    if family is not None:
        holder = holder_of_layers(model, layers)
        if sum(report.fused.values()) == len(layers):
            _let_last_layer_take_rows(holder, layers[-1], family)
        if reason := why_not_final_norm(holder, family):
            report.left[f"final norm: {reason}"] += 1
        else:
            fuse_final_norm(holder, family)
            report.final_norm = True
    if report.fused:
        bind_walks(model)
    return report


def holder_of_layers(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The module that calls the decoder layers, and then the final norm."""
    path = next(name for name, module in model.named_modules() if module is layers[-1])
    return model.get_submodule(path.rpartition(".")[0].rpartition(".")[0])  # <holder>.layers.<number>


def _let_last_layer_take_rows(holder: nn.Module, layer: Any, family: Family) -> None:
    """Marks the last layer, and the model that holds it, which then takes `loss_rows`. Experts' router losses are over
    all tokens, so a layer with experts keeps them all."""
    if class_path(layer.mlp) == family.class_path("MLP"):
        for module in (layer, holder):
            vars(module)[TAKES_ROWS] = True


def unfuse(model: nn.Module) -> int:
    """Gives every fused layer its own forward back; returns how many there were."""
    fused = [module for module in model.modules() if is_bound(module, "forward", layer_forward)]
    for layer in fused:
        del vars(layer)["forward"]
        vars(layer).pop("activations", None)
        vars(layer).pop(GRAPHS, None)
    unbind_walks(model)
    unfuse_final_norm(model)
    for module in model.modules():
        vars(module).pop(TAKES_ROWS, None)
    return len(fused)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that are called so and have attention and an MLP, wherever they are: the text tower's of a vision
    model, and not its encoder's."""
    return [
        module for module in model.modules()
        if type(module).__name__.endswith("DecoderLayer") and hasattr(module, "self_attn") and hasattr(module, "mlp")
    ]  # fmt: skip


def _why_not_layer(layer: Any, family: Family) -> str | None:
    """What is fixed once a layer exists: its classes, and the settings that the blocks do not have."""
    if class_path(layer.self_attn) != family.class_path("Attention"):
        return f"its attention is a {type(layer.self_attn).__name__}"
    for name in _norm_names(layer, family):
        norm = layer.get_submodule(name)
        norm = getattr(norm, "original_module", norm)  # wrapped by PEFT to be trained, which `_read_norm` looks at
        if class_path(norm) != family.class_path("RMSNorm"):
            return f"its {name} is a {type(norm).__name__}"
    if any(
        getattr(layer, name, None) and getattr(layer, name).p > 0
        for name in ("resid_attn_dropout", "resid_mlp_dropout")
    ):
        return "it drops out of the residual stream"
    return None


def _norm_names(layer: Any, family: Family) -> list[str]:
    names = [family.pre_attention_norm, family.post_attention_norm]
    if class_path(layer.mlp) == family.class_path("MLP"):
        names += [family.pre_mlp_norm, family.post_mlp_norm]
    own = ["self_attn.q_norm", "self_attn.k_norm"] if family.qk_norm else []
    return [name for name in names if name is not None] + own


def parts_left(layer: Any, family: Family) -> dict[str, str]:
    """Which of a layer's blocks run as Transformers and PEFT have them just now, and why."""
    left = {}
    for part, read in (("attention", _attention_blocks), ("MLP", _mlp_block)):
        try:
            read(layer, family, torch.float32)
        except NotFusable as reason:
            left[part] = str(reason)
    return left


# -- the forward of a layer --------------------------------------------------------------------------------------------


def layer_forward(
    self,
    hidden_states: Tensor,
    *args,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    loss_rows: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """A decoder layer's forward: [B, S, H] -> [B, S, H].

    A cache is filled where there are gradients, because Transformers makes one by default; elsewhere, and where the
    backward pass would fill it a second time, the forward is the class's own.
    `loss_rows` (int64 [K], flat positions): the last layer may give [1, K, H], those rows alone.
    """
    given = kwargs | {"attention_mask": attention_mask, "past_key_values": past_key_values}
    given["position_embeddings"] = position_embeddings
    cached = past_key_values is not None
    if args or position_embeddings is None or (cached and not _fills_cache(self)):
        return type(self).forward(self, hidden_states, *args, **given)
    graphs = None if cached else vars(self).get(GRAPHS)
    if graphs is not None and (result := graphs.forward(self, hidden_states, given)) is not None:
        return result
    if self.training and self.gradient_checkpointing and not _CHECKPOINTED_BY_CALL:
        return self._gradient_checkpointing_func(functools.partial(run_layer, self, given, None), hidden_states)
    rows_K = loss_rows if hasattr(self, TAKES_ROWS) else None
    with self.activations.saving(position_embeddings) if hasattr(self, "activations") else nullcontext():
        if hasattr(self, "activations") and self.activations.checkpoint and torch.is_grad_enabled():
            return _checkpointed(self, given, rows_K, hidden_states)
        return run_layer(self, given, rows_K, hidden_states)


def _fills_cache(layer: Any) -> bool:
    planned = hasattr(layer, "activations") and layer.activations.checkpoint
    checkpointed = planned or (layer.training and layer.gradient_checkpointing)
    if checkpointed and torch.is_grad_enabled():
        _warn_of_cache(type(layer).__name__)
    return torch.is_grad_enabled() and not checkpointed


@functools.cache  # once
def _warn_of_cache(name: str) -> None:
    mend = "unless it is needed, pass use_cache=False or set model.config.use_cache = False."
    logger.warning("%s is not fused in calls with a cache, which checkpointing would fill twice: %s", name, mend)


def _checkpointed(layer: Any, given: dict[str, Any], rows_K: Tensor | None, hidden_states: Tensor) -> Tensor:
    """Saves the layer's input alone. The backward pass runs its attention again, for what that saves and for the MLP's
    input, from which the MLP's node makes the rest itself."""

    @contextmanager
    def again():
        layer.activations.again = True
        try:
            yield
        finally:
            layer.activations.again = False

    run = functools.partial(run_layer, layer, given, rows_K)
    return checkpoint(run, hidden_states, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def run_layer(self: Any, given: dict[str, Any], rows_K: Tensor | None, hidden_states: Tensor) -> Tensor:
    """A fused layer's forward: each part as a block, or as Transformers and PEFT have it."""
    family = family_of(self)
    assert family is not None
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype
    try:
        qkv, out = _attention_blocks(self, family, dtype)
        _refuse_attention_weights(self, given)
    except NotFusable:
        hidden_states = _plain_attention(self, family, hidden_states, given)
    else:
        with torch.autocast(device, enabled=False):
            qkv.rows_K = out.rows_K = rows_K
            hidden_states = _fused_attention(self, family, qkv, out, hidden_states, given)
    try:
        mlp = _mlp_block(self, family, dtype)
    except NotFusable:
        return _plain_mlp(self, family, hidden_states)
    with torch.autocast(device, enabled=False):
        return mlp(hidden_states.flatten(0, 1)).view_as(hidden_states)


def _refuse_attention_weights(layer: Any, given: dict[str, Any]) -> None:
    """Transformers collects them by a hook on the attention module, whose call the blocks skip."""
    if given.get("output_attentions", layer.self_attn.config.output_attentions):
        raise NotFusable("its weights were asked for")


def _fused_attention(
    layer: Any, family: Family, qkv: QkvProjection, out: ResidualProjection, hidden_BSH: Tensor, given: dict[str, Any]
) -> Tensor:
    attention = layer.self_attn
    batch, length, _ = hidden_BSH.shape
    cos = sin = None
    if getattr(attention, "use_rope", True):
        cos, sin = (x.expand(batch, -1, -1).flatten(0, 1) for x in given["position_embeddings"])
    *heads, residual_TH = qkv(hidden_BSH.flatten(0, 1), cos, sin)
    q, k, v = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in heads)
    cache = given["past_key_values"]
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
        qkv.owns_gradients = False  # the caller may read the cache too
    own = ("position_embeddings", "attention_mask", "past_key_values")
    arguments = {name: value for name, value in given.items() if name not in own}
    arguments |= _attention_arguments(attention, family)
    attended, _ = _attention_function(attention)(
        attention,
        q,
        k,
        v,
        given["attention_mask"],
        dropout=attention.attention_dropout if layer.training else 0.0,
        scaling=attention.scaling,
        **arguments,
    )
    hidden_KH = out(attended.flatten(0, 1).flatten(1), residual_TH)
    return hidden_KH.view_as(hidden_BSH) if out.rows_K is None else hidden_KH[None]


def _attention_function(attention: Any):
    own = sys.modules[type(attention).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, own)


def _plain_attention(layer: Any, family: Family, hidden: Tensor, given: dict[str, Any]) -> Tensor:
    x = hidden if family.pre_attention_norm is None else getattr(layer, family.pre_attention_norm)(hidden)
    y = layer.self_attn(hidden_states=x, **given)[0]
    return _plain_residual(layer, family, family.post_attention_norm, hidden, y)


def _plain_mlp(layer: Any, family: Family, hidden: Tensor) -> Tensor:
    x = hidden if family.pre_mlp_norm is None else getattr(layer, family.pre_mlp_norm)(hidden)
    y = layer.mlp(x)
    y = y[0] if isinstance(y, tuple) else y  # with router logits
    return _plain_residual(layer, family, family.post_mlp_norm, hidden, y)


def _plain_residual(layer: Any, family: Family, post_norm: str | None, residual: Tensor, y: Tensor) -> Tensor:
    if post_norm is not None:
        y = getattr(layer, post_norm)(y)
    return residual + (y * layer.residual_multiplier if family.residual_multiplier else y)


# -- what the parts of a layer are just now ----------------------------------------------------------------------------


@dataclass(slots=True)
class LayerBlocks:
    """All that a layer computes with, beside what it is given."""

    qkv: QkvProjection
    out: ResidualProjection
    mlp: GatedMlp
    attention: str
    attention_dropout: float
    attention_arguments: tuple[float | None, ...]  # scaling, window, softcap

    @property
    def linears(self) -> list[Linear]:
        return [*self.qkv.linears, self.out.linear, *self.mlp.gate_up, self.mlp.down]


def layer_blocks(layer: Any, dtype: torch.dtype) -> LayerBlocks:
    """A layer's blocks as they are just now. Raises `NotFusable` where a part is left to Transformers or PEFT."""
    family = family_of(layer)
    assert family is not None
    qkv, out = _attention_blocks(layer, family, dtype)
    _refuse_attention_weights(layer, {})
    attention = layer.self_attn
    arguments = _attention_arguments(attention, family).values()
    dropout = attention.attention_dropout if layer.training else 0.0
    return LayerBlocks(
        qkv, out, _mlp_block(layer, family, dtype), attention.config._attn_implementation, dropout,
        (attention.scaling, *arguments),
    )  # fmt: skip


def _attention_arguments(attention: Any, family: Family) -> dict[str, float | None]:
    named = {"sliding_window": family.window, "softcap": family.softcap}
    return {name: operator.attrgetter(path)(attention) for name, path in named.items() if path is not None}


def _attention_blocks(layer: Any, family: Family, dtype: torch.dtype) -> tuple[QkvProjection, ResidualProjection]:
    attention = layer.self_attn
    if class_path(attention) != family.class_path("Attention"):  # replaced since the layer was fused (AdaptionPrompt)
        raise NotFusable(f"it is a {type(attention).__name__}")
    _refuse_hooks(attention)
    linears = [read_linear(getattr(attention, name)) for name in family.qkv]
    config, head_dim = attention.config, attention.head_dim
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    qkv = QkvProjection(
        norm=_read_norm(layer, family.pre_attention_norm, family),
        linears=linears,
        widths=(query, key, key),
        head_dim=head_dim,
        q_norm=_read_norm(attention, "q_norm" if family.qk_norm else None, family),
        k_norm=_read_norm(attention, "k_norm" if family.qk_norm else None, family),
        norm_rows=family.qk_norm == "row",
        dtype=dtype,
        owns_gradients=config._attn_implementation == ATTENTION_NAME,  # another may keep them, or views
    )
    multiplier = layer.residual_multiplier if family.residual_multiplier else 1.0
    out = ResidualProjection(
        read_linear(attention.o_proj), _read_norm(layer, family.post_attention_norm, family), multiplier
    )
    return qkv, out


def _mlp_block(layer: Any, family: Family, dtype: torch.dtype) -> GatedMlp:
    mlp = layer.mlp
    if class_path(mlp) != family.class_path("MLP"):
        raise NotFusable(f"it is a {type(mlp).__name__}")
    _refuse_hooks(mlp)
    activation = ACTIVATIONS.get(type(getattr(mlp, family.activation)).__name__)
    if activation is None:
        raise NotFusable(f"its activation is {type(getattr(mlp, family.activation)).__name__}")
    activations = getattr(layer, "activations", None)
    return GatedMlp(
        norm=_read_norm(layer, family.pre_mlp_norm, family),
        gate_up=[read_linear(getattr(mlp, name)) for name in family.gate_up],
        activation=activation,
        down=read_linear(mlp.down_proj),
        post_norm=_read_norm(layer, family.post_mlp_norm, family),
        multiplier=layer.residual_multiplier if family.residual_multiplier else 1.0,
        dtype=dtype,
        recompute=activations is not None and activations.recompute,
        unused=activations is not None and activations.again,
    )


def _read_norm(owner: Any, name: str | None, family: Family) -> Norm | None:
    if name is None:
        return None
    norm = getattr(owner, name)
    if type(norm).__name__ != f"{family.prefix}RMSNorm":  # wrapped by PEFT to be trained
        raise NotFusable(f"its {name} is a {type(norm).__name__}")
    _refuse_hooks(norm)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return Norm(norm.weight, eps, family.norm_offset)


def read_linear(module: Any) -> Linear:
    """A linear of Transformers, bitsandbytes or PEFT as it is just now. Raises `NotFusable`."""
    if not isinstance(module, LoraLayer):
        return _read_base(module)
    return _read_lora(module)


def _read_lora(module: Any) -> Linear:
    _refuse_hooks(module)
    if class_path(module) not in _LORA_LINEARS:
        raise NotFusable(f"PEFT's {type(module).__name__} layers are left to it")
    linear = _read_base(module.base_layer)
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged:
        if module.disable_adapters or set(active) - set(module.merged_adapters):
            raise NotFusable("an adapter is merged that is not all of what is active")
        return linear
    if module.disable_adapters or not active:
        return linear
    if len(active) > 1:
        raise NotFusable("several adapters are active")
    (name,) = active
    lora_A, lora_B, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if name in module.lora_variant:
        raise NotFusable(f"{type(module.lora_variant[name]).__name__} is left to PEFT")
    if type(dropout) not in (nn.Identity, nn.Dropout):
        raise NotFusable(f"{type(dropout).__name__} in an adapter is left to PEFT")
    for part in (lora_A, lora_B, dropout):
        _refuse_hooks(part)
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear or lora_B.bias is not None:
        raise NotFusable("LoRA with a bias is left to PEFT")
    linear.a_RK, linear.b_NR, linear.scaling = lora_A.weight, lora_B.weight, module.scaling[name]
    if module.training and isinstance(dropout, nn.Dropout):
        linear.dropout = dropout.p
    return linear


def _read_base(module: Any) -> Linear:
    _refuse_hooks(module)
    if type(module) is Fp8Linear:
        return Linear(QuantizedWeight(module.fp8_weight), module.bias)
    if isinstance(module.weight, DTensor):
        raise NotFusable("its weight is sharded")
    if type(module) is nn.Linear:
        return Linear(DenseWeight(module.weight), module.bias)
    if class_path(module) == _NF4_LINEAR and getattr(module.weight, "quant_state", None) is not None:
        return Linear(Nf4Weight(module.weight.data, module.weight.quant_state), module.bias)
    raise NotFusable(f"{type(module).__name__} is left as it is")


def _refuse_hooks(module: nn.Module) -> None:
    """Hooks and replaced forwards of a module whose call the blocks skip would be skipped too."""
    own = vars(module)
    if is_replaced(module, "forward") and not is_bound(module, "forward", lora_linear_forward):
        raise NotFusable(f"the forward of a {type(module).__name__} was replaced")
    hooks = own["_forward_hooks"]
    hooks = hooks and [hook for hook in hooks.values() if hook.__module__ != _CAPTURES_OUTPUTS]
    if hooks or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        raise NotFusable(f"a {type(module).__name__} has hooks")
