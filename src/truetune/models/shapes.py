"""What of a model decides the memory and the time of its step: shapes, read from its modules.

The modules may be on the meta device, and need not have the precision yet that their weights will have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from truetune.models.adapters import base_model
from truetune.models.attention import expands_keys
from truetune.models.families import Family, class_path, family_of
from truetune.models.final_norm import why_not_final_norm
from truetune.models.fuse import decoder_layers, holder_of_layers, parts_left
from truetune.ops.linear_cross_entropy import kept_dtype

FP32 = 4
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, a scale a block of 64, a scale of scales a block of 256


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. `ranks`: of the adapters of q/k/v together, o, gate and up together, down.

    `intermediate` is 0 where the MLP is not ours, and `other_mlp` then the items a token that it is taken to save.
    `made`: elements of the weights that are made dense, or cast, for each product: the largest, and all of the MLP's.
    `expands_keys`: of its attention's backend. `owns_gradients`: as in `QkvProjection`.
    """

    hidden: int
    heads: int
    query: int
    key: int
    intermediate: int
    ranks: tuple[int, int, int, int]
    qk_norm: str | None
    pre_attention_norm: bool
    post_attention_norm: bool
    pre_mlp_norm: bool
    post_mlp_norm: bool
    one_qkv: bool = False
    other_mlp: int = 0
    made: tuple[int, int] = (0, 0)
    expands_keys: bool = True
    owns_gradients: bool = False
    trained_mlp: bool = False  # then its recomputation takes all rows at once
    gradients: int = 0  # bytes
    linear_elements: int = 0


@dataclass(frozen=True)
class ModelShape:
    """`weights`: bytes of all parameters and buffers. `gradients`: bytes of those of all trained parameters.

    `optimizer`: (elements, bytes an element) of every trained tensor. `head`: vocabulary rows of the LM head.
    `hidden_gradient`: bytes an element of its hidden states' gradient, as the loss keeps it.
    """

    layers: tuple[LayerShape, ...]
    weights: int
    gradients: int
    trained: tuple[tuple[int, int], ...]
    compute: int
    residual: int
    hidden: int
    head: int
    head_made: bool  # cast to the compute dtype for the loss
    head_gradient: int  # bytes a trained element, 0: frozen
    hidden_gradient: int
    embedding_gradient: int
    tied: bool
    norm_fused: bool
    norm_trained: bool
    linear_elements: int


def why_not_planned(model: nn.Module) -> str | None:
    """One sentence on why a model's activations cannot be planned, or None."""
    layers = decoder_layers(model)
    unknown = {type(layer).__name__ for layer in layers if family_of(layer) is None}
    if unknown or not layers:
        name = " and ".join(sorted(unknown)) or type(base_model(model)).__name__
        return f"{name} is not an architecture that is fused"
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.peft_type == "PREFIX_TUNING":
        return "prefix tuning gives layers a cache, which checkpointing would fill twice"
    for layer in layers:
        family = family_of(layer)
        assert family is not None
        for part, why in parts_left(layer, family).items():
            if part == "attention" or not hasattr(layer.mlp, "experts"):  # which are counted
                return f"the {part} of {type(layer).__name__} is not ours ({why})"
    return None


def read_model(
    model: Any, compute_dtype: torch.dtype, precision: str | None = None, *, packed: bool = True
) -> ModelShape:
    """The shapes of a model whose every decoder layer is of a known family; on the meta device too.

    `precision` "nf4" or "fp8" counts frozen linears as they will be, where the model at hand is dense. `packed`: its
    batches are, and attention is ours.
    """
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    made = precision == "nf4"
    decoder = decoder_layers(model)
    layers = tuple(_read_layer(layer, family_of(layer), compute_dtype, made, packed) for layer in decoder)
    trained = [p for p in _unique(model) if p.requires_grad]
    embedding_weight, head_weight = (_plain(module).weight for module in (embedding, head))
    family, holder = family_of(decoder[-1]), holder_of_layers(model, decoder)
    assert family is not None
    norm = getattr(holder, "norm", None)
    return ModelShape(
        layers=layers,
        weights=_weight_bytes(model, head, precision),
        gradients=sum(p.numel() * p.element_size() for p in trained),
        trained=tuple((p.numel(), p.element_size()) for p in trained),
        compute=compute_dtype.itemsize,
        residual=embedding_weight.dtype.itemsize,
        hidden=embedding_weight.shape[1],
        head=head_weight.shape[0],
        head_made=head_weight.dtype != compute_dtype,
        head_gradient=head_weight.element_size() if head_weight.requires_grad else 0,
        hidden_gradient=kept_dtype(embedding_weight.dtype).itemsize,
        embedding_gradient=embedding_weight.element_size() if embedding_weight.requires_grad else 0,
        tied=head_weight is embedding_weight,
        norm_fused=why_not_final_norm(holder, family) is None,
        norm_trained=isinstance(norm, nn.Module) and any(p.requires_grad for p in norm.parameters()),
        linear_elements=sum(layer.linear_elements for layer in layers),
    )


def _unique(model: nn.Module) -> list[nn.Parameter]:
    return list({id(p): p for p in model.parameters()}.values())


def _plain(module: Any) -> Any:
    """What is used of a module that PEFT wraps: the copy that it trains, or what it wraps."""
    while True:
        if hasattr(module, "modules_to_save") and len(module.modules_to_save):
            module = next(iter(module.modules_to_save.values()))
        elif hasattr(module, "base_layer"):
            module = module.base_layer
        elif hasattr(module, "original_module"):
            module = module.original_module
        else:
            return module


def _weight_bytes(model: nn.Module, head: Any, precision: str | None) -> int:
    total = sum(p.numel() * p.element_size() for p in _unique(model))
    total += sum(b.numel() * b.element_size() for b in model.buffers())
    module: Any
    for module in model.modules():
        if isinstance(module, LoraLayer):  # whose `weight` is that of the layer that it wraps
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:  # beside the packed codes
            total += state.absmax.numel() * state.absmax.element_size()
            total += 0 if state.state2 is None else state.state2.absmax.numel() * FP32
        elif precision in ("nf4", "fp8") and _becomes_quantized(module, head):
            total += quantized_bytes(module.out_features, module.in_features, precision)
            total -= module.weight.numel() * module.weight.element_size()
    return total


def _becomes_quantized(module: Any, head: Any) -> bool:
    return type(module) is nn.Linear and module is not _plain(head) and not module.weight.requires_grad


def quantized_bytes(rows: int, columns: int, precision: str) -> int:
    """A weight as nf4 with double quantization, or as fp8 in both layouts with a scale a row of each."""
    if precision == "nf4":
        return round(rows * columns * NF4_BITS / 8)
    return 2 * rows * columns + FP32 * (rows + columns)


@dataclass(frozen=True)
class _LinearShape:
    elements: int
    rank: int
    made: bool
    trained: bool


def _read_linear(module: Any, compute: torch.dtype, made: bool) -> _LinearShape:
    rank = 0
    if isinstance(module, LoraLayer):
        adapters: Any = module.lora_A
        # AdaLoRA's are parameters, and no linears.
        matrices = [adapters[name] for name in module.active_adapters if name in adapters]
        rank = sum(getattr(matrix, "weight", matrix).shape[0] for matrix in matrices)
        module = module.base_layer
    weight = module.weight
    half = type(module) is nn.Linear and weight.dtype == compute  # FP8's are multiplied as they are
    made = made or not (half or type(module).__name__ == "Fp8Linear")
    return _LinearShape(module.in_features * module.out_features, rank, made, bool(getattr(weight, "requires_grad", 0)))


def _read_layer(layer: Any, family: Family | None, compute: torch.dtype, made: bool, packed: bool) -> LayerShape:
    assert family is not None
    attention, mlp = layer.self_attn, layer.mlp
    config, head_dim = attention.config, attention.head_dim
    ours = class_path(mlp) == family.class_path("MLP")

    def read(owner: Any, names: Sequence[str]) -> list[_LinearShape]:
        return [_read_linear(getattr(owner, name), compute, made) for name in names]

    qkv, out = read(attention, family.qkv), read(attention, ("o_proj",))
    gate_up, down = (read(mlp, family.gate_up), read(mlp, ("down_proj",))) if ours else ([], [])
    linears, mlp_linears = [*qkv, *out, *gate_up, *down], [*gate_up, *down]
    hidden = config.hidden_size
    elements = sum(linear.elements for linear in linears)
    active = elements
    other_mlp = 0
    if not ours:  # of each expert of a token: what it was given, gate, up, their product and what it gave
        width, chosen = config.moe_intermediate_size, config.num_experts_per_tok
        other_mlp = chosen * (2 * hidden + 4 * width)
        active += chosen * 3 * hidden * width
    return LayerShape(
        hidden=hidden,
        heads=config.num_attention_heads,
        query=config.num_attention_heads * head_dim,
        key=config.num_key_value_heads * head_dim,
        intermediate=down[0].elements // hidden if ours else 0,
        ranks=tuple(sum(x.rank for x in group) for group in (qkv, out, gate_up, down)),  # type: ignore[arg-type]
        qk_norm=family.qk_norm,
        pre_attention_norm=family.pre_attention_norm is not None,
        post_attention_norm=family.post_attention_norm is not None,
        pre_mlp_norm=family.pre_mlp_norm is not None,
        post_mlp_norm=family.post_mlp_norm is not None,
        one_qkv=len(qkv) == 1,
        other_mlp=other_mlp,
        made=(
            max((x.elements for x in linears if x.made), default=0),
            sum(x.elements for x in mlp_linears if x.made and not x.trained),
        ),
        expands_keys=not packed or expands_keys(attention, compute),
        owns_gradients=packed,
        trained_mlp=any(x.trained for x in mlp_linears),
        gradients=sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad),
        linear_elements=active,
    )
