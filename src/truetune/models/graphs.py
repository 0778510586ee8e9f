"""Fused decoder layers as CUDA graphs: the forward passes of the first two, those of the others, all backward passes.

A layer of a small model is over on a GPU before the host has launched it: a 0.6B model's step on 16,384 tokens takes
120 ms on an H200 and took 200, the rest waiting for the host. Here all layers but the last, which takes the loss's rows
alone, run once as they are, are captured, and from then on cost the host three launches. The first layer's forward
gives the result of all of them, and the others pass it on.

A graph has one size, that of the token budget: packs become that long by documents of zeros at their end. It reads and
writes the same memory each time: what the parts of all layers are is read anew at every call, and where anything is not
as it was when they were captured, they are captured again, or run as they are.

P: tokens of the graph, T: of a pack, N: documents, H: hidden size, R: rotary size.
"""

import functools
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from truetune.models.attention import PackMask, attention_calls
from truetune.models.fuse import GRAPHS, LayerBlocks, NotFusable, layer_blocks, run_layer

logger = logging.getLogger(__name__)
SHORTEST = 15 / 16  # of the token budget, where packs of all lengths are to be expected: what zeros may cost
HOST_BOUND = 1.1  # plain passes that take this much longer wait for the host, and take no less for shorter packs
MOST_CAPTURES = 8  # where the layers change again and again, they run as they are
MOST_ERROR = 1e-2  # of the replayed to the plain pass, relative, or three times that between two plain ones: attention
# adds up its gradients in any order, and FP8 rounds the difference up
SPARE_DOCUMENTS = 16  # and a quarter of those of the pack that is captured, where nobody knows what others have
SHORT_DOCUMENT = 128  # tokens, a tile of attention's: with 64 FlashAttention-4 takes 3% longer on an H200
FIRST_LAYERS = 2  # in a graph of their own, which is soon launched: the host needs 1.3 ms for 27 layers' one
_AT_ONCE = "and CUDA graphs run all layers at once: set cuda_graphs to False."
# What attention reads of a call is static here; the rest of these says nothing to a layer.
_STATIC = ("position_embeddings", "attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_UNREAD = ("position_ids", "cache_position")


# -- what a call and a layer are ---------------------------------------------------------------------------------------


class NotCapturable(Exception):
    """Why layers run one by one."""


def _leaves(value: Any) -> Iterator[Any]:
    """What stands in blocks, through dataclasses, tuples and lists."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


def _tensors(blocks: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(blocks) if isinstance(leaf, Tensor)]


def _state(leaf: Any) -> Any:
    """What of a leaf a captured kernel depends on: where a tensor is, whether it is trained, a number."""
    if isinstance(leaf, Tensor):
        parameter = id(leaf) if leaf.requires_grad else None  # gradients go to it, and not to its memory
        return leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype, parameter
    if isinstance(leaf, str | int | float | torch.dtype | None):
        return leaf
    return id(leaf)  # a 4-bit weight's quantization, which is made once


def _blocks(layers: Sequence[Any], dtype: torch.dtype) -> list[LayerBlocks]:
    """The blocks of all layers as they are just now. Raises `NotCapturable` where a graph could not do what they do."""
    blocks = []
    for layer in layers:
        own = vars(layer)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            raise NotCapturable("a layer has hooks")
        activations = own.get("activations")
        recomputes = activations is not None and (activations.checkpoint or activations.recompute)
        if recomputes or layer.gradient_checkpointing or (activations is not None and activations.host is not None):
            raise NotCapturable("a layer does not keep its activations")
        try:
            of_layer = layer_blocks(layer, dtype)
        except NotFusable as reason:
            raise NotCapturable(str(reason)) from reason
        if of_layer.attention_dropout > 0 or any(linear.dropout > 0 for linear in of_layer.linears):
            raise NotCapturable("a layer drops out")
        # A capture would hold them, and autograd call them again.
        if any(tensor._backward_hooks for tensor in _tensors(of_layer)):
            raise NotCapturable("a parameter has hooks")
        blocks.append(of_layer)
    return blocks


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """What a call says to a layer beside what is static in a graph."""
    return {name: value for name, value in given.items() if name not in _STATIC and name not in _UNREAD}


def _has_tensors(arguments: dict[str, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in arguments.values())


# -- graphs ------------------------------------------------------------------------------------------------------------


class Recorder:
    """Captures CUDA graphs on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Work on the recorder's stream, between what the current one did before and does after."""
        current = torch.cuda.current_stream(self.stream.device)
        torch.cuda.empty_cache()  # what one stream has kept another cannot use
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)
            torch.cuda.empty_cache()

    def capture(self, *runs: Callable[[], None]) -> list[torch.cuda.CUDAGraph]:
        """A graph of each, all in one pool of memory. A pool does not outlive its graphs: later ones have their own."""
        graphs, pool = [], torch.cuda.graph_pool_handle()
        for run in runs:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")  # other threads may read data
            try:
                run()
            finally:
                graph.capture_end()
            graphs.append(graph)
        return graphs


@dataclass(eq=False)
class _Turn:
    """One forward pass through the graphs, which holds their memory until its backward pass, or until it is dropped."""

    done: bool = False


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_1TH, captured: "_Captured", turn: _Turn, *trained) -> Tensor:
        ctx.captured, ctx.turn = captured, turn
        return captured.result(hidden_1TH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_1TH):
        if ctx.turn.done:
            raise RuntimeError("the layers' saved tensors are gone after their first backward pass: run forward again.")
        ctx.turn.done = True
        d_hidden_1TH, gradients = ctx.captured.replay_backward(dout_1TH)
        return d_hidden_1TH, None, None, *gradients


class _Captured:
    """The graphs, and the memory that they read and write."""

    def __init__(
        self, layers: Sequence[nn.Module], given: Sequence[dict[str, Any]], hidden_1TH: Tensor, tokens: int,
        longest: int, documents: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.layers, self.longest = layers, longest
        self.given = list(given)
        cos_1TR = given[0]["position_embeddings"][0]
        self.hidden_1PH = hidden_1TH.new_zeros((1, tokens, hidden_1TH.shape[2]))
        self.hidden_1PH.requires_grad_(hidden_1TH.requires_grad)
        self.dout_1PH = torch.zeros_like(self.hidden_1PH)
        self.cos_1PR, self.sin_1PR = (cos_1TR.new_zeros((1, tokens, cos_1TR.shape[2])) for _ in range(2))
        self.cu_seq_lens = torch.full((documents + 1,), tokens, dtype=torch.int32, device=hidden_1TH.device)
        self.from_one = torch.arange(1, documents + 2, dtype=torch.int32, device=hidden_1TH.device)
        blocks = _blocks(layers, dtype)
        self.state = self._state_of(blocks, hidden_1TH, dtype)
        self.read = [x.detach() for x in _tensors(blocks)]  # a replay may come before what is new is seen
        self.trained = list({id(x): x for x in _tensors(blocks) if x.requires_grad}.values())
        self.out_1PH = self.d_hidden_1PH = torch.empty(0)
        self.gradients: list[Tensor | None] = []
        self._result: Tensor | None = None  # of a forward pass that is on its way, or waits for its backward pass
        self._masks: dict[int, PackMask] = {}
        self.attention_calls: dict[str, int] = {}
        self.host_bound = False

    @staticmethod
    def _state_of(blocks: Sequence[Any], hidden: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
        return hidden.dtype, hidden.device, hidden.requires_grad, dtype, *map(_state, _leaves(blocks))

    def is_current(self, hidden_1TH: Tensor, dtype: torch.dtype) -> bool:
        """Whether all layers are as they were when they were captured; some milliseconds of the host."""
        try:
            return self.state == self._state_of(_blocks(self.layers, dtype), hidden_1TH, dtype)
        except NotCapturable:
            return False

    # -- the passes, as they are captured

    def forward_parts(self) -> list[Callable[[], None]]:
        """The forward pass: the first layers, and the rest, which goes on with what the first part has left."""
        first, rest = slice(0, FIRST_LAYERS), slice(FIRST_LAYERS, None)
        parts = [first, rest] if len(self.layers) > FIRST_LAYERS else [first]
        return [functools.partial(self._run_layers, part) for part in parts]

    def _run_layers(self, part: slice) -> None:
        if part.start == 0:
            self._result, self._masks = self.hidden_1PH, {}
        hidden, masks = self._result, self._masks
        assert hidden is not None
        for layer, given in zip(self.layers[part], self.given[part], strict=True):
            mask = given["attention_mask"]
            if mask is not None and id(mask) not in masks:
                masks[id(mask)] = PackMask(mask.arguments)  # knows no documents yet
            static = {
                "position_embeddings": (self.cos_1PR, self.sin_1PR),
                "attention_mask": None if mask is None else masks[id(mask)],
                "cu_seq_lens_q": self.cu_seq_lens,
                "cu_seq_lens_k": self.cu_seq_lens,
                "max_length_q": self.longest,
                "max_length_k": self.longest,
            }
            hidden = run_layer(layer, _arguments(given) | static, None, hidden)
        self._result, self.out_1PH = hidden, hidden.detach()

    def forward(self) -> None:
        for part in self.forward_parts():
            part()

    def backward(self) -> None:
        assert self._result is not None
        inputs = [self.hidden_1PH] if self.hidden_1PH.requires_grad else []
        found = torch.autograd.grad(self._result, inputs + self.trained, self.dout_1PH, allow_unused=True)
        self._result, self._masks = None, {}
        if inputs:
            self.d_hidden_1PH = found[0]
        self.gradients = list(found[len(inputs) :])

    def capture(self, recorder: Any) -> None:
        """Runs both passes as they are, captures them, and compares. Raises `NotCapturable` where results differ."""
        calls = attention_calls.copy()
        try:
            with recorder.aside():
                self.dout_1PH.copy_(self.hidden_1PH.detach())
                self.forward()
                self.attention_calls = dict(attention_calls - calls)
                self.backward()
                plain = self._results()
                seconds = self._seconds(self.forward, self.backward)
                noise = list(map(_relative_error, self._results(), plain))
            with recorder.aside():
                graphs = recorder.capture(*self.forward_parts(), self.backward)
                *self.forward_graphs, self.backward_graph = graphs
        finally:  # none of these is a pass of the training
            attention_calls.clear()
            attention_calls.update(calls)
        for written in (self.out_1PH, self.d_hidden_1PH, *self.gradients):
            if written is not None:
                written.zero_()
        self.replay_forward()
        self.backward_graph.replay()
        self.host_bound = seconds > HOST_BOUND * self._seconds(self.replay_forward, self.backward_graph.replay)
        for what, ours, exact, between in zip(("results", "gradients"), self._results(), plain, noise, strict=True):
            error = _relative_error(ours, exact)
            if not error <= max(MOST_ERROR, 3 * between):
                raise NotCapturable(f"their replayed {what} differ by {error:.1e}")

    def _seconds(self, *runs: Callable[[], None]) -> float:
        synchronize = torch.cuda.synchronize if self.hidden_1PH.is_cuda else lambda: None
        synchronize()
        begun = time.perf_counter()
        for run in runs:
            run()
        synchronize()
        return time.perf_counter() - begun

    def _results(self) -> tuple[list[Tensor], list[Tensor]]:
        gradients = [self.d_hidden_1PH, *(x for x in self.gradients if x is not None)]
        return [self.out_1PH.clone()], [x.clone() for x in gradients]

    # -- a call

    def has_arguments(self, given: dict[str, Any]) -> bool:
        """Whether a call has those that were captured."""
        arguments = _arguments(given)
        return not _has_tensors(arguments) and arguments == _arguments(self.given[0])

    def has_room(self, hidden_1TH: Tensor, given: dict[str, Any]) -> bool:
        """For a pack's documents, and those of zeros."""
        zeros = self.hidden_1PH.shape[1] - hidden_1TH.shape[1]
        return len(given["cu_seq_lens_q"]) + -(-zeros // self.longest) <= len(self.cu_seq_lens)

    def fill(self, hidden_1TH: Tensor, given: dict[str, Any]) -> None:
        """A pack's hidden states, angles and documents, and behind them documents of zeros, and empty ones."""
        length, documents = hidden_1TH.shape[1], len(given["cu_seq_lens_q"])
        with torch.no_grad():
            self.hidden_1PH[:, :length] = hidden_1TH
            self.hidden_1PH[:, length:] = 0
            for static, now in zip((self.cos_1PR, self.sin_1PR), given["position_embeddings"], strict=True):
                static[:, :length] = now
            self.cu_seq_lens[:documents] = given["cu_seq_lens_q"]
            tokens, left = self.hidden_1PH.shape[1], len(self.cu_seq_lens) - documents
            # As short as there is room for, but `SHORT_DOCUMENT`.
            zeros = max(-(-(tokens - length) // max(1, left)), min(SHORT_DOCUMENT, self.longest))
            self.cu_seq_lens[documents:] = (length + zeros * self.from_one[:left]).clamp(max=tokens)

    def replay_forward(self) -> None:
        for graph in self.forward_graphs:
            graph.replay()

    def result(self, hidden_1TH: Tensor) -> Tensor:
        attention_calls.update(self.attention_calls)
        return self.out_1PH[:, : hidden_1TH.shape[1]].detach()

    def replay_backward(self, dout_1TH: Tensor) -> tuple[Tensor | None, list[Tensor | None]]:
        length = dout_1TH.shape[1]
        self.dout_1PH[:, :length] = dout_1TH
        self.dout_1PH[:, length:] = 0
        self.backward_graph.replay()
        # Copies: the next replay overwrites what autograd may keep as a parameter's gradient.
        found = [x for x in self.gradients if x is not None]
        copies = [torch.empty_like(x) for x in found]
        if found:  # nothing is trained but what lies before the layers
            torch._foreach_copy_(copies, found)
        left = iter(copies)
        gradients = [None if x is None else next(left) for x in self.gradients]
        d_hidden = self.d_hidden_1PH[:, :length].clone() if self.hidden_1PH.requires_grad else None
        return d_hidden, gradients


def _relative_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """0 where both are 0."""
    difference = sum(float((a.double() - b.double()).norm() ** 2) for a, b in zip(ours, exact, strict=True))
    norm = sum(float(b.double().norm() ** 2) for b in exact)
    return 0.0 if difference == 0 else float("inf") if norm == 0 else (difference / norm) ** 0.5


# -- the layers --------------------------------------------------------------------------------------------------------


class LayerGraphs:
    """Layers that are fused and keep everything, all but the model's last, as CUDA graphs of `tokens` tokens.

    `longest`: of all documents. `documents`: what packs hardly exceed, where known. `shortest`: packs with fewer
    tokens run as they are, unless the host is what they would wait for. The first pack is run layer by layer, to learn
    what the model gives each of its layers; the next one is captured before it is run, and so is one with many more
    documents. `why_off`: where that failed, or cannot be had. `recorder` makes the graphs.
    """

    def __init__(
        self, layers: Sequence[nn.Module], tokens: int, longest: int, shortest: int, recorder: Any,
        documents: int | None = None,
    ) -> None:  # fmt: skip
        self.layers, self.recorder = list(layers), recorder
        self.tokens, self.longest, self.shortest = tokens, min(longest, tokens), shortest
        self.documents = documents
        self.replays = self.captures = 0
        self.why_off: str | None = None
        self._numbers = {id(layer): number for number, layer in enumerate(layers)}
        self._given: list[dict[str, Any]] = []  # what each layer was given, by which they are captured
        self._captured: _Captured | None = None
        self._turn: Callable[[], _Turn | None] = lambda: None
        self._passed_on: Tensor | None = None
        self._next = 0  # the layer to which it is passed on
        for layer in layers:
            vars(layer)[GRAPHS] = self

    def __reduce__(self):
        return type(None), ()  # a copied or saved layer has none

    def release(self) -> None:
        """Gives the graphs' memory back; the layers run as they are from here on."""
        for layer in self.layers:
            vars(layer).pop(GRAPHS, None)
        self._captured, self._given, self._passed_on = None, [], None

    def forward(self, layer: nn.Module, hidden_1TH: Tensor, given: dict[str, Any]) -> Tensor | None:
        """The result of all layers, or None: this one must run as it is."""
        number = self._numbers[id(layer)]
        if number == 0:
            turn, unfinished = self._turn(), self._passed_on is not None
            self._passed_on, self._next = None, 1
            if unfinished and turn is not None and turn.done:  # and not given up half way
                raise RuntimeError(f"a pass ended before layer {len(self.layers)}, {_AT_ONCE}")
            result = self._all_layers(hidden_1TH, given)
            self._passed_on = result if len(self.layers) > 1 else None
            return result
        if self._passed_on is None:
            if len(self._given) == number:
                self._given.append(given)
            return None
        if hidden_1TH is not self._passed_on or number != self._next:
            raise RuntimeError(
                f"{type(layer).__name__} {number} was not given what the layer before it returned, {_AT_ONCE}"
            )
        self._next += 1
        if number == len(self.layers) - 1:
            self._passed_on = None
        return hidden_1TH

    def _all_layers(self, hidden_1TH: Tensor, given: dict[str, Any]) -> Tensor | None:
        learned = len(self._given) == len(self.layers)
        takes = self.why_off is None and self._takes(hidden_1TH, given)
        if not takes or not learned:
            self._given = self._given if learned else [given] if takes else []
            return None
        device = hidden_1TH.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_1TH.dtype
        if self._captured is not None and self._captured.has_room(hidden_1TH, given):
            self._captured.fill(hidden_1TH, given)
            self._captured.replay_forward()
            # While the device is at it: what it does now is of no use where something has changed since the last time.
            if self._captured.is_current(hidden_1TH, dtype):
                return self._replayed(hidden_1TH, self._captured)
        self._captured = None  # whose memory the layers may need
        try:
            self._captured = self._capture(hidden_1TH, given, dtype)
        except NotCapturable as reason:
            self.why_off = str(reason)
        if self._captured is None:
            torch.cuda.empty_cache()  # of what was captured, which the exception held until here
            logger.warning("The layers run without CUDA graphs: %s.", self.why_off)
            return None
        self._captured.replay_forward()
        return self._replayed(hidden_1TH, self._captured)

    def _replayed(self, hidden_1TH: Tensor, captured: _Captured) -> Tensor:
        turn = _Turn()
        self._turn = weakref.ref(turn)
        self.replays += 1
        return _Layers.apply(hidden_1TH, captured, turn, *captured.trained)

    def _takes(self, hidden_1TH: Tensor, given: dict[str, Any]) -> bool:
        """Whether this is a pack that a graph can be filled with, and the graph is free."""
        cu_seq_lens, longest = given.get("cu_seq_lens_q"), given.get("max_length_q")
        if not torch.is_grad_enabled() or hidden_1TH.shape[0] != 1 or cu_seq_lens is None or longest is None:
            return False
        captured, turn = self._captured, self._turn()
        shortest = 1 if captured is not None and captured.host_bound else self.shortest
        fits = shortest <= hidden_1TH.shape[1] <= self.tokens and longest <= self.longest
        return fits and (turn is None or turn.done) and (captured is None or captured.has_arguments(given))

    def _room(self, documents: int) -> int:
        """For how many documents a graph is made for a pack that has so many. Those that stay empty cost attention half
        a microsecond each in every layer. Where there was too little room before it doubles, and soon is enough."""
        expected = self.documents
        if expected is None or expected < documents:
            spare = documents // 4 if self.captures == 1 else documents
            expected = documents + spare + SPARE_DOCUMENTS
        return expected + -(-self.tokens // self.longest)  # of zeros

    def _capture(self, hidden_1TH: Tensor, given: dict[str, Any], dtype: torch.dtype) -> _Captured:
        """Raises `NotCapturable` where the layers cannot be captured."""
        first, *others = self._given
        if any(x["position_embeddings"][0] is not first["position_embeddings"][0] for x in others):
            raise NotCapturable("its layers have angles of several kinds")
        if any(_has_tensors(_arguments(x)) for x in self._given):
            raise NotCapturable("its layers are given tensors of their own")
        if any(not isinstance(x["attention_mask"], PackMask | None) for x in self._given):
            raise NotCapturable("its layers have masks")
        self.captures += 1
        if self.captures > MOST_CAPTURES:
            raise NotCapturable("its layers change again and again")
        room = self._room(len(given["cu_seq_lens_q"]) - 1)
        captured = _Captured(self.layers, self._given, hidden_1TH, self.tokens, self.longest, room, dtype)
        if not captured.trained and not hidden_1TH.requires_grad:
            raise NotCapturable("nothing in its layers is trained")
        captured.fill(hidden_1TH, given)
        try:
            captured.capture(self.recorder)
        except NotCapturable:
            raise
        except Exception as error:  # of a compiler, a launch or the allocator: without graphs they run
            raise NotCapturable(f"they could not be captured ({' '.join(str(error).split())[:200]})") from error
        return captured
