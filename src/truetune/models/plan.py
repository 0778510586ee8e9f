"""The activation plan: what of each fused layer is kept for the backward pass, recomputed, or put on the host.

A layer's choice is one of

    keep        everything that the blocks save stays on the device
    host        gate and up stay, the rest goes to pinned host memory
    recompute   gate and up are made again in the backward pass, the rest stays
    lean        both
    checkpoint  only the layer's input stays, all else is made again
    checkpoint_host  the input goes to the host too
    offload     everything goes to the host, nothing is recomputed

and a policy is how choices are made: `keep` gives every layer its own name; `lean` takes of the two choices that leave
least on the device, `lean` and `checkpoint_host`, the mix that is fastest with this host; `auto` takes the fastest mix
that fits, `offload` the fastest that fits without recomputing. A layer with experts has not all choices (`possible`).
`choose` is a pure function of sizes, memory and rates.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truetune.models.bound import is_bound
from truetune.models.errors import ModelError
from truetune.models.fuse import decoder_layers, layer_forward
from truetune.models.memory import CHECKPOINTED, CHOICES, ON_HOST, RECOMPUTED, StepMemory, possible
from truetune.models.offload import HostMemory
from truetune.models.shapes import LayerShape

POLICIES = ("auto", "keep", "lean", "offload")
MARGIN = 0.06  # of the device: what other libraries take, and what the plan does not know
FRAGMENTATION = 0.03  # of all that is not held: what the allocator cannot use of its blocks
SHARED = 0.03  # of a copy's time is lost to the layer that it hides behind: both use the device's memory
PINNED_BY_AUTO = 0.5  # of the host's memory, at most, where auto chooses
PINNED_BY_NAME = 0.8  # and where another policy was asked for
GIB = 2**30


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass
class LayerActivations:
    """What one layer does: `recompute` its MLP in the backward pass, or all of it (`checkpoint`); save to `host`, where
    there is one.

    `stays`: widths of matrices that are not put there (gate and up, where they are kept). `again`: it is being made
    again just now.
    """

    index: int
    recompute: bool = False
    checkpoint: bool = False
    again: bool = False
    host: HostMemory | None = None
    stays: frozenset[int] = frozenset()

    def saving(self, rotary_tables: Sequence[Tensor]) -> AbstractContextManager[None]:
        if self.host is None or not torch.is_grad_enabled():
            return nullcontext()
        return self.host.saving(self.index, self.stays, shared=rotary_tables)


def fused_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in decoder_layers(model) if is_bound(layer, "forward", layer_forward)]


def set_activations(layers: Sequence[Any], choices: Sequence[str]) -> None:
    """Puts `choices`, one a layer, into fused layers. Without a GPU there is no host to go to: what would stays."""
    device = next(layers[0].parameters()).device if layers else torch.device("cpu")
    on_host = device.type == "cuda" and bool(ON_HOST & set(choices))
    before = next((layer.activations.host for layer in layers if hasattr(layer, "activations")), None)
    host = (before or HostMemory(device)) if on_host else None  # its pinned buffers serve the next plan too
    for index, (layer, choice) in enumerate(zip(layers, choices, strict=True)):
        vars(layer)["activations"] = LayerActivations(
            index,
            recompute=choice in RECOMPUTED,
            checkpoint=choice in CHECKPOINTED,
            host=host if choice in ON_HOST else None,
            stays=_gate_up_widths(layer) if choice == "host" else frozenset(),
        )


def _gate_up_widths(layer: Any) -> frozenset[int]:
    down = getattr(layer.mlp, "down_proj", None)
    width = getattr(down, "in_features", None)
    return frozenset() if width is None else frozenset((width, 2 * width))


# -- time --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Seconds of one layer's forward pass and backward pass, and of making again: gate and up, and all of attention;
    bytes a second to or from the host.

    `host_bytes`: the memory that the host has for this process; 0 without a GPU.
    """

    forward: float
    backward: float
    recompute: float
    attention: float
    host_rate: float
    host_bytes: int = 0


def layer_seconds(memory: StepMemory, choices: Sequence[str], rates: Rates) -> float:
    """How long the layers of a micro-batch take: recomputation adds up, copies cost little that are not waited for.

    Copies queue up on one stream. A layer's forward pass begins when the copies of the layer two before it are done,
    whose memory it may need; its backward pass begins when its tensors are back, which are asked for as the backward
    pass of the layer after it begins (`offload.py`).
    """
    layers = memory.of_layers(choices)
    copies = [memory.correction * layer.host / rates.host_rate for layer in layers]
    clock = stream = 0.0
    done = [0.0] * len(layers)
    for i, copy in enumerate(copies):
        if i >= 2:
            clock = max(clock, done[i - 2])
        stream = max(stream, clock) + copy
        done[i] = stream
        clock += rates.forward + SHARED * copy
    back = dict.fromkeys(range(len(layers) - 2, len(layers)), 0.0)  # the last two never left
    for i in reversed(range(len(layers))):
        clock = max(clock, back[i])
        if i > 0 and i - 1 not in back:
            stream = max(stream, clock) + copies[i - 1]
            back[i - 1] = stream
        again = rates.recompute * (choices[i] in RECOMPUTED) + rates.attention * (choices[i] in CHECKPOINTED)
        clock += rates.backward + SHARED * copies[i] + again
    return clock


# -- the choice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Device bytes that a step may take, weights included, and all that the device has."""

    available: int
    device: int

    def fits(self, memory: StepMemory, choices: Sequence[str]) -> bool:
        return self.needed(memory, choices) <= self.available

    def needed(self, memory: StepMemory, choices: Sequence[str]) -> int:
        peak = memory.peak(choices)
        return round(peak + FRAGMENTATION * (peak - memory.held) + MARGIN * self.device)


def kinds_of(policy: str, has_host: bool) -> tuple[str, ...]:
    of_policy = {
        "keep": ("keep",),
        "lean": ("lean", "checkpoint_host") if has_host else ("checkpoint",),
        "offload": ("keep", "host", "offload"),
    }
    kinds = of_policy.get(policy, tuple(choice for choice in CHOICES if choice != "offload"))
    return tuple(kind for kind in kinds if has_host or kind not in ON_HOST)


def mixes(policy: str, shapes: Sequence[LayerShape], has_host: bool) -> Iterator[tuple[str, ...]]:
    """All that `choose` looks at, a fixed list, so that more memory is never slower.

    Two choices a mix: the leaner one in the first layers, because the memory of the last ones is free again first, or
    spread over all, which gives each layer's copies the time of its neighbours.
    """
    mixed = _mixes(kinds_of(policy, has_host), len(shapes))
    return iter(dict.fromkeys(possible(shapes, choices) for choices in mixed))


def _mixes(kinds: Sequence[str], layers: int) -> Iterator[tuple[str, ...]]:
    for kind in kinds:
        yield (kind,) * layers
    leaner_first = sorted(permutations(kinds, 2), key=lambda pair: kinds.index(pair[0]) < kinds.index(pair[1]))
    for lean, other in leaner_first:
        for count in range(1, layers, max(1, layers // 32)):  # half a second for 32 layers
            yield (lean,) * count + (other,) * (layers - count)
            spread = tuple(lean if (i + 1) * count // layers > i * count // layers else other for i in range(layers))
            yield spread


def choose(policy: str, memory: StepMemory, room: Room, rates: Rates) -> tuple[str, ...]:
    """The fastest mix of `policy` that fits into `room`; where none does, the leanest. The first of equals.

    None pins more than a share of the host's memory, whose end is the end of the process, without a word.
    """
    best: tuple[float, tuple[str, ...]] | None = None
    leanest: tuple[int, tuple[str, ...]] | None = None
    for choices in mixes(policy, memory.model.layers, rates.host_bytes > 0):
        if not _host_takes(policy, memory, choices, rates):
            continue
        needed = room.needed(memory, choices)
        if leanest is None or needed < leanest[0]:
            leanest = needed, choices
        if needed <= room.available:
            if set(choices) == {"keep"}:
                return choices  # nothing is faster than what neither computes again nor copies
            seconds = layer_seconds(memory, choices, rates)
            if best is None or seconds < best[0] * (1 - 1e-9):
                best = seconds, choices
    found = best or leanest
    return found[1] if found is not None else _what_the_host_takes(policy, memory, rates)


def _what_the_host_takes(policy: str, memory: StepMemory, rates: Rates) -> tuple[str, ...]:
    """Of layers that keep their input alone, as many inputs on the host as it takes, the first layers' first."""
    layers = len(memory.model.layers)
    of_both = (("checkpoint_host",) * n + ("checkpoint",) * (layers - n) for n in range(layers, -1, -1))
    return next(choices for choices in of_both if _host_takes(policy, memory, choices, rates))


def _host_takes(policy: str, memory: StepMemory, choices: Sequence[str], rates: Rates) -> bool:
    share = PINNED_BY_AUTO if policy == "auto" else PINNED_BY_NAME
    return sum(layer.pinned for layer in memory.of_layers(choices)) <= share * rates.host_bytes


def advice(policy: str, memory: StepMemory, room: Room, rates: Rates, batch_size: int, length: int) -> str:
    """What to lower, and to what, so that a micro-batch of `batch_size` rows of `length` tokens fits."""

    layers, has_host = memory.model.layers, rates.host_bytes > 0

    def fits(tokens: int, policy: str = policy) -> bool:
        smaller = replace(memory, tokens=tokens)
        uniform = (possible(layers, (kind,) * len(layers)) for kind in kinds_of(policy, has_host))
        return any(room.fits(smaller, mix) and _host_takes(policy, smaller, mix, rates) for mix in uniform)

    if policy not in ("auto", "lean") and fits(memory.tokens, "auto"):
        return "set activation_policy to auto"
    for rows in range(batch_size - 1, 0, -1):
        if fits(rows * length):
            return f"lower per_device_train_batch_size from {batch_size} to {rows}"
    step = 256 if length > 512 else 16
    shorter = next((n for n in range(length // step * step, 0, -step) if n < length and fits(n)), None)
    if shorter is not None:
        alone = f" per_device_train_batch_size from {batch_size} to 1 and" if batch_size > 1 else ""
        return f"lower{alone} max_length from {length} to {shorter}"
    return "train an adapter on 4-bit weights (qlora), take a smaller model, or a GPU with more memory"


# -- saved plans -------------------------------------------------------------------------------------------------------


@dataclass
class ActivationPlan:
    """Choices, what they came from, and what they were predicted and measured to need (bytes)."""

    policy: str
    choices: tuple[str, ...]
    tokens: int = 0
    predicted_peak: int | None = None
    measured_peak: int | None = None  # of the rehearsal, which has no optimizer state
    device_bytes: int | None = None
    correction: float = 1.0
    terms: dict[str, int] = field(default_factory=dict)

    @property
    def in_words(self) -> str:
        """ "keep 20 of 32 layers, 12 lean; predicted peak 61.2 GiB of 139"."""
        counts = {choice: self.choices.count(choice) for choice in CHOICES if choice in self.choices}
        (first, most), *others = counts.items()
        words = f"{first} all {most} layers" if not others else f"{first} {most} of {len(self.choices)} layers"
        words = ", ".join([words, *(f"{number} {choice}" for choice, number in others)])
        if self.predicted_peak is None:
            return words
        of = "" if self.device_bytes is None else f" of {self.device_bytes / GIB:.0f}"
        return f"{words}; predicted peak {self.predicted_peak / GIB:.1f} GiB{of}"

    @property
    def runs(self) -> str:
        """ "12 lean, 20 keep", in the order of the layers."""
        runs = [f"{len(list(run))} {choice}" for choice, run in groupby(self.choices)]
        return ", ".join(runs) if len(runs) < 6 else f"{', '.join(runs[:4])} and so on"

    def save(self, path: Path) -> None:
        beside = path.with_name(f".{path.name}.new")
        beside.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)


def load_plan(path: str, layers: int) -> ActivationPlan:
    """A saved plan for a model of so many layers. Raises `ModelError`."""
    try:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        choices = tuple(saved["choices"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the activation plan {path} cannot be read ({error!r}): give a saved plan, or auto."
        ) from None
    if unknown := sorted({str(choice) for choice in choices} - set(CHOICES)):
        raise ModelError(
            f"the activation plan {path} has the choice {unknown[0]!r}: a layer's choices are {', '.join(CHOICES)}."
        )
    if len(choices) != layers:
        raise ModelError(
            f"the activation plan {path} is for {len(choices)} layers, not for {layers}: use auto instead."
        )
    return ActivationPlan(policy=path, choices=choices)
