"""Where the device memory of a training step goes, from shapes alone: a model on the meta device is enough.

Three kinds of bytes: held (weights, optimizer, gradients), saved (what `blocks.py` leaves for the backward pass, each
layer's by its choice in `plan.py`), and passing (what a layer or the head needs while it runs). The peak is looked for
along the step: each layer's forward pass, the head, each layer's backward pass, the optimizer.

Bytes a token are counted in items of the residual stream (`residual`) and of what linears compute in (`compute`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from truetune.models.adapters import base_model
from truetune.models.blocks import RECOMPUTED_ROWS
from truetune.models.families import Family, class_path, family_of
from truetune.models.fuse import decoder_layers
from truetune.models.offload import SMALLEST, on_device, pinned_bytes
from truetune.ops.linear_cross_entropy import chunk_bytes

FP32 = 4
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, a scale a block of 64, a scale of scales a block of 256
CHOICES = ("keep", "host", "recompute", "lean", "checkpoint", "checkpoint_host", "offload")
ON_HOST = {"host", "lean", "checkpoint_host", "offload"}
RECOMPUTED = {"recompute", "lean", "checkpoint", "checkpoint_host"}  # gate and up at the least
CHECKPOINTED = {"checkpoint", "checkpoint_host"}

# -- shapes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer. `ranks`: of the adapters of q/k/v together, o, gate and up together, down.

    `intermediate` is 0 where the MLP is not ours, and `other_mlp` then the items a token that it is taken to save.
    `made`: elements of the weights that are made dense, or cast, for each product: the largest, and all of the MLP's.
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
    trained_mlp: bool = False  # then its recomputation takes all rows at once
    gradients: int = 0  # bytes
    linear_elements: int = 0


@dataclass(frozen=True)
class ModelShape:
    """`weights`: bytes of all parameters and buffers. `gradients`: bytes of those of all trained parameters.

    `optimizer`: (elements, bytes an element) of every trained tensor. `head`: vocabulary rows of the LM head.
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
    embedding_gradient: int
    tied: bool
    norm_trained: bool
    linear_elements: int


def why_not_planned(model: nn.Module) -> str | None:
    """One sentence on why a model's activations cannot be planned, or None."""
    layers = decoder_layers(model)
    unknown = {type(layer).__name__ for layer in layers if family_of(layer) is None}
    if unknown or not layers:
        return f"{' and '.join(sorted(unknown)) or type(model).__name__} is not an architecture that is fused"
    return None


def read_model(model: Any, compute_dtype: torch.dtype, precision: str | None = None) -> ModelShape:
    """The shapes of a model whose every decoder layer is of a known family; on the meta device too.

    `precision` "nf4" or "fp8" counts frozen linears as they will be, where the model at hand is dense.
    """
    base = base_model(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    made = precision == "nf4"
    layers = tuple(_read_layer(layer, family_of(layer), compute_dtype, made) for layer in decoder_layers(model))
    trained = [p for p in _unique(model) if p.requires_grad]
    embedding_weight, head_weight = (_plain(module).weight for module in (embedding, head))
    norms = [m for m in base.base_model.children() if hasattr(m, "weight") and not isinstance(m, nn.Embedding)]
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
        embedding_gradient=embedding_weight.element_size() if embedding_weight.requires_grad else 0,
        tied=head_weight is embedding_weight,
        norm_trained=any(norm.weight.requires_grad for norm in norms),
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


def _read_layer(layer: Any, family: Family | None, compute: torch.dtype, made: bool) -> LayerShape:
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
        trained_mlp=any(x.trained for x in mlp_linears),
        gradients=sum(p.numel() * p.element_size() for p in layer.parameters() if p.requires_grad),
        linear_elements=active,
    )


# -- what a layer saves ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A tensor that a layer's forward pass leaves for its backward pass. `group`: whose backward pass frees it.

    `hosted`: large enough tensors can go to the host (views of a joined projection, which are not contiguous, cannot).
    """

    name: str
    bytes_a_token: int
    group: str
    hosted: bool = True


def saved_tensors(shape: LayerShape, compute: int, residual: int, choice: str = "keep") -> list[Saved]:
    """What the blocks of `blocks.py`, and attention between them, save of each token under a choice of `plan.py`."""
    c, r, s = compute, residual, shape
    if choice in CHECKPOINTED:
        return [Saved("residual stream", r * s.hidden, "attention")]
    lone = not s.one_qkv
    attention = {
        "residual stream": (r * s.hidden, True),
        "rstd": (FP32 * s.pre_attention_norm, True),
        "q before norm": (c * s.query if s.qk_norm else 0, lone),
        "k before norm": (c * s.key if s.qk_norm else 0, lone),
        "q/k rstd": (2 * FP32 * (s.qk_norm == "row"), True),
        "q": (c * s.query, lone),
        "k": (c * s.key, lone),
        "v": (c * s.key, lone),
        "attention output": (c * s.query, True),
        "log-sum-exp": (FP32 * s.heads, True),
        "rank products of q, k, v": (c * s.ranks[0], True),
        "rank products of o": (c * s.ranks[1], True),
        "before post-attention norm": (c * s.hidden * s.post_attention_norm, True),
        "post-attention rstd": (FP32 * s.post_attention_norm, True),
    }
    mlp = {
        "residual stream of the MLP": (r * s.hidden, True),
        "other MLP": (c * s.other_mlp, False),
        "MLP rstd": (FP32 * s.pre_mlp_norm, True),
        "rank products of gate, up": (c * s.ranks[2], True),
        "rank products of down": (c * s.ranks[3], True),
        "before post-MLP norm": (c * s.hidden * s.post_mlp_norm, True),
        "post-MLP rstd": (FP32 * s.post_mlp_norm, True),
        "gate": (c * s.intermediate, True),
        "up": (c * s.intermediate, True),
    }
    if choice in RECOMPUTED and s.intermediate:
        mlp = {"residual stream of the MLP": (r * s.hidden, True)}
    groups = {"attention": attention, "mlp": mlp}
    return [
        Saved(name, size, group, hosted)
        for group, tensors in groups.items()
        for name, (size, hosted) in tensors.items()
        if size
    ]


@dataclass(frozen=True)
class LayerBytes:
    """One layer under one choice: saved on the device (`mlp` of it is freed first), on the host, and passing.

    `pinned`: what the buffers take in which `host` lies.
    """

    device: int
    mlp: int
    host: int
    pinned: int
    forward: int
    mlp_backward: int
    attention_backward: int
    gradients: int


@functools.lru_cache(maxsize=256)
def layer_bytes(shape: LayerShape, choice: str, tokens: int, compute: int, residual: int) -> LayerBytes:
    c, r, s, T = compute, residual, shape, tokens
    stays = {"gate", "up"} if choice == "host" else set()  # of what could go to the host
    device = {"attention": 0, "mlp": 0}
    host = pinned = 0
    for saved in saved_tensors(s, c, r, choice):
        size = saved.bytes_a_token * T
        if choice in ON_HOST and saved.hosted and size >= SMALLEST and saved.name not in stays:
            host += size
            pinned += pinned_bytes(size)
        else:
            device[saved.group] += size
    largest, mlp_made = (elements * c for elements in s.made)
    hidden, stream, wide = c * s.hidden * T, r * s.hidden * T, c * (s.intermediate or s.other_mlp) * T
    forward = hidden + stream + wide + largest
    mlp_backward = stream + max(wide, 2 * hidden + stream) + largest
    if choice in RECOMPUTED and s.intermediate:
        rows = T if s.trained_mlp else min(T, RECOMPUTED_ROWS)
        chunk = rows * (c * s.hidden + 3 * c * s.intermediate + 2 * r * s.hidden)
        forward = max(hidden + stream + largest, stream + chunk + mlp_made)
        mlp_backward = 2 * stream + chunk + mlp_made
    q, kv = c * s.query * T, 2 * c * s.key * T
    # FlashAttention-2: the gradient of q is summed in fp32, those of k and v are made for each query head.
    flash = 2 * q + kv + FP32 * s.query * T + (2 * q if s.query != s.key else 0)
    qkv = 2 * (q + kv) + 2 * hidden + stream + largest
    again = 0
    if choice in CHECKPOINTED:  # then all that is saved of attention is there while the backward pass runs
        again = T * sum(saved.bytes_a_token for saved in saved_tensors(s, c, r, "recompute")) - stream
        forward = max(forward, hidden + 2 * q + kv + stream + largest)
    return LayerBytes(
        device=sum(device.values()),
        mlp=device["mlp"],
        host=host,
        pinned=pinned,
        forward=forward,
        mlp_backward=again + mlp_backward,
        attention_backward=again + stream + max(flash, qkv),
        gradients=s.gradients,
    )


# -- a step ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepMemory:
    """The memory of one process's training step.

    `tokens` of a micro-batch; `optimizer`: bytes of its state; `accumulates`: gradients outlive a micro-batch;
    `buckets`: DDP's copies of them; `full_logits`: the loss is not ours; `head_in_slabs`: its logits
    are never held (`ops/frozen_head.py`); `correction`: measured over predicted, of all
    but what is held.
    """

    model: ModelShape
    tokens: int
    optimizer: int
    accumulates: bool = False
    buckets: bool = False
    optimizer_step: int = 0
    full_logits: bool = False
    head_in_slabs: bool = False
    correction: float = 1.0

    def before_first_step(self) -> "StepMemory":
        """A rehearsal's: no optimizer state yet, no gradients from before, and no DDP round the model."""
        return replace(self, optimizer=0, accumulates=False, buckets=False, optimizer_step=0)

    @property
    def held(self) -> int:
        model = self.model
        buckets = model.gradients if self.buckets else 0
        return model.weights + self.optimizer + buckets + (model.gradients if self.accumulates else 0)

    def of_layers(self, choices: Sequence[str]) -> list[LayerBytes]:
        model = self.model
        return [
            layer_bytes(shape, choice, self.tokens, model.compute, model.residual)
            for shape, choice in zip(model.layers, choices, strict=True)
        ]

    def peak(self, choices: Sequence[str]) -> int:
        """Bytes at the worst moment, with layer i under `choices[i]`."""
        return max(self.moments(choices).values())

    def moments(self, choices: Sequence[str]) -> dict[str, int]:
        """The bytes at each moment of the step that can be its peak."""
        return {name: self.held + round(self.correction * size) for name, (size, _) in self._passing(choices).items()}

    def _passing(self, choices: Sequence[str]) -> dict[str, tuple[int, int]]:
        """At each moment: the bytes that are not held, and those of them that are on their way to or from the host."""
        layers = self.of_layers(choices)
        new = not self.accumulates  # gradients appear layer by layer, or are there from the micro-batch before
        head = self.head()
        moving = on_device([layer.host for layer in layers])
        saved, in_forward, in_backward = 0, (0, 0), (0, 0)
        for layer, leaving in zip(layers, moving.forward, strict=True):
            saved += layer.device
            in_forward = max(in_forward, (saved + leaving + layer.forward, leaving))
        at_head = saved + moving.head + max(head.values())
        gradients = head["gradients kept"] if new else 0
        for layer, around in zip(reversed(layers), reversed(moving.backward), strict=True):
            if new:
                gradients += layer.gradients
            fresh = layer.gradients * self.accumulates
            mlp = saved + layer.mlp_backward
            attention = saved - layer.mlp + layer.attention_backward
            in_backward = max(in_backward, (around + gradients + fresh + max(mlp, attention), around))
            saved -= layer.device
        embedding = self.model.embedding_gradient * self.model.head * self.model.hidden
        first = self.model.residual * self.model.hidden * self.tokens
        all_gradients = self.model.gradients * new
        in_embedding = all_gradients + first + embedding * (self.accumulates + self.model.tied) + moving.after
        return {
            "forward pass": in_forward,
            "head": (at_head, moving.head),
            "backward pass": in_backward,
            "embedding's gradient": (in_embedding, moving.after),
            "optimizer step": (all_gradients + self.optimizer_step + moving.after, moving.after),
        }

    def head(self, gradients: bool = True) -> dict[str, int]:
        """The bytes of final norm, head and loss, forward and backward; every row of the batch is supervised."""
        m, T = self.model, self.tokens
        hidden, stream, matrix = m.compute * m.hidden * T, m.residual * m.hidden * T, m.head * m.hidden
        logits = chunk_bytes(T, m.hidden, m.head, m.compute, in_slabs=self.head_in_slabs and gradients)
        if self.full_logits:  # and TRL's loss makes fp32 copies of them
            logits = T * m.head * (m.compute + 2 * FP32)
        cast = matrix * m.compute * m.head_made
        if not gradients:
            return {"forward": stream + logits + cast}
        norm = (FP32 * m.hidden * T if m.residual < FP32 else 0) + hidden * m.norm_trained
        d_weight = FP32 * matrix if m.head_gradient else 0
        scaled = m.head_gradient * matrix if 0 < m.head_gradient < FP32 else 0  # fp32 ones are scaled in place
        return {
            "forward": norm + stream + hidden + logits + d_weight + cast,
            "backward": norm + hidden + stream + d_weight + scaled,
            "norm backward": norm + stream + 3 * FP32 * m.hidden * T + (scaled or d_weight),
            "gradients kept": scaled or d_weight,
        }

    def evaluation_peak(self, tokens: int, full_logits: bool) -> int:
        """Bytes of a batch without gradients, at whose end gradients and optimizer state may be there."""
        batch = replace(self, tokens=tokens, full_logits=full_logits)
        forward = max(layer.forward for layer in batch.of_layers(["keep"] * len(self.model.layers)))
        head = batch.head(gradients=False)["forward"]
        stream = self.model.residual * self.model.hidden * tokens
        return self.held + round(self.correction * (max(forward, head) + 2 * stream))

    def terms(self, choices: Sequence[str]) -> dict[str, int]:
        """Where the memory goes at the peak, term by term; they sum to it."""
        moments = self.moments(choices)
        at = max(moments, key=moments.__getitem__)
        layers = self.of_layers(choices)
        model = self.model
        terms = {
            "weights": model.weights,
            "optimizer state": self.optimizer,
            "gradients": model.gradients * self.accumulates,
            "DDP buckets": model.gradients * self.buckets,
        }
        if at in ("forward pass", "head", "backward pass"):
            terms["saved activations"] = round(self.correction * sum(layer.device for layer in layers))
        elif not self.accumulates:
            terms["gradients"] = round(self.correction * model.gradients)
        terms["on their way to or from the host"] = round(self.correction * self._passing(choices)[at][1])
        passing = moments[at] - sum(terms.values())
        if passing < 0:  # a peak before all is saved
            terms["saved activations"] += passing
            passing = 0
        return {name: size for name, size in {**terms, f"passing, {at}": passing}.items() if size}


# -- optimizers --------------------------------------------------------------------------------------------------------

_SMALL = 4096  # bitsandbytes keeps the states of smaller tensors in fp32


def optimizer_bytes(name: str, trained: Sequence[tuple[int, int]]) -> int:
    """Bytes of an optimizer's state on the device, by Transformers' name: AdamW has two values an element."""
    if name.startswith("paged"):
        return 0  # in memory that the driver moves
    if name.startswith("adafactor"):
        return sum(size * elements // 64 for elements, size in trained)  # a row and a column of each matrix
    values = 0 if name == "sgd" else 1 if name.startswith(("lion", "adagrad", "rmsprop")) else 2
    total = 0
    for elements, size in trained:
        eight_bit = "8bit" in name and elements >= _SMALL
        total += values * (elements + FP32 * -(-elements // 256) if eight_bit else elements * size)
    return total


def optimizer_step_bytes(name: str, trained: Sequence[tuple[int, int]]) -> int:
    """What an optimizer's step needs for a moment: AdamW that is not fused makes copies, group by group."""
    if name in ("adamw_torch_fused", "sgd") or "bit" in name:
        return 0
    return sum(elements * size for elements, size in trained)
