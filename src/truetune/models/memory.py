"""Where the device memory of a training step goes, from the shapes of `shapes.py` alone.

Three kinds of bytes: held (weights, optimizer, gradients), saved (what `blocks.py` leaves for the backward pass, each
layer's by its choice in `plan.py`), and passing (what a layer or the head needs while it runs). The peak is looked for
along the step: each layer's forward pass, the head, each layer's backward pass, the optimizer.

Bytes a token are counted in items of the residual stream (`residual`) and of what linears compute in (`compute`).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from truetune.models.blocks import RECOMPUTED_ROWS
from truetune.models.offload import SMALLEST, on_device, pinned_buffers
from truetune.models.shapes import FP32, LayerShape, ModelShape
from truetune.ops.linear_cross_entropy import chunk_bytes

CHOICES = ("keep", "host", "recompute", "lean", "checkpoint", "checkpoint_host", "offload")
ON_HOST = {"host", "lean", "checkpoint_host", "offload"}
RECOMPUTED = {"recompute", "lean", "checkpoint", "checkpoint_host"}  # gate and up at the least
CHECKPOINTED = {"checkpoint", "checkpoint_host"}
_WITH_EXPERTS = {"recompute": "keep", "lean": "checkpoint_host"}  # nothing of experts is made again but as a layer


def possible(shapes: Sequence[LayerShape], choices: Sequence[str]) -> tuple[str, ...]:
    """`choices`, one a layer, or what layers with experts do in their place."""
    return tuple(
        _WITH_EXPERTS.get(choice, choice) if shape.other_mlp else choice
        for shape, choice in zip(shapes, choices, strict=True)
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
            pinned += sum(pinned_buffers(size))
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
    # The gradient of q is summed in fp32; those of k and v too, or they are made for each query head.
    of_keys = 0 if s.query == s.key else 2 * q if s.expands_keys else FP32 * 2 * s.key * T
    flash = 2 * q + kv + FP32 * s.query * T + of_keys
    # The gradients of q, k and v, and what becomes of them: rotated, joined, or through norms of whole rows.
    copies = 1 + (not s.owns_gradients) + s.one_qkv + (s.qk_norm == "row")
    qkv = copies * (q + kv) + 2 * hidden + stream + largest
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
        fp32 = FP32 * m.hidden * T
        d_hidden = m.hidden_gradient * m.hidden * T
        norm = stream if m.norm_fused else fp32 + hidden * m.norm_trained  # saved: its input
        norm_backward = 2 * stream if m.norm_fused else 2 * hidden + 4 * fp32
        d_weight = FP32 * matrix if m.head_gradient else 0
        scaled = m.head_gradient * matrix if 0 < m.head_gradient < FP32 else 0  # fp32 ones are scaled in place
        return {
            "forward": norm + stream + d_hidden + logits + d_weight + cast,
            "backward": norm + stream + d_hidden + d_weight + scaled,
            "norm backward": norm + norm_backward + (scaled or d_weight),
            "gradients kept": scaled or d_weight,
        }

    def evaluation_peak(self, tokens: int, full_logits: bool) -> int:
        """Bytes of a batch without gradients, at whose end gradients and optimizer state may be there."""
        batch, model = replace(self, tokens=tokens, full_logits=full_logits), self.model
        layers = zip(batch.of_layers(["keep"] * len(model.layers)), model.layers, strict=True)
        # Gate and up, which a training step counts among what is saved, are there too.
        forward = max(layer.forward + 2 * model.compute * shape.intermediate * tokens for layer, shape in layers)
        head = batch.head(gradients=False)["forward"]
        stream = model.residual * model.hidden * tokens
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
