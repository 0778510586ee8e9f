"""Saved activations on the host: copied out behind the forward pass, and back ahead of the backward pass.

`HostMemory.saving(layer)` is a context round one layer's forward. What autograd saves inside it, if it is large and no
parameter, is copied to pinned host memory on a stream of its own, bit for bit, and given back when the backward pass
asks for it; by then the copy has been under way since the backward pass of the layer after it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

SMALLEST = 2**23  # bytes; smaller ones are not worth a copy
LARGEST_BUFFER = 2**26  # bytes of a pinned buffer, at most


def pinned_buffers(num_bytes: int) -> list[int]:
    """Sizes of the buffers that hold so many bytes: the next power of two, or as many of the largest as they fill."""
    if num_bytes <= LARGEST_BUFFER:
        return [1 << (num_bytes - 1).bit_length()]
    return [LARGEST_BUFFER] * -(-num_bytes // LARGEST_BUFFER)


@dataclass(frozen=True)
class OnDevice:
    """Bytes of the host's layers that are on the device: in each layer's forward pass, at the head, in each layer's
    backward pass, and after it."""

    forward: list[int]
    head: int
    backward: list[int]
    after: int


def on_device(host: Sequence[int]) -> OnDevice:
    """What `HostMemory` has there, of layers that put `host` bytes out; 0 for those that it never sees.

    A layer's bytes leave when the next of its layers is done, and come back with those of the one before it.
    """
    before, after = [0], [0]
    for size in host:
        before.append(size or before[-1])
    for size in reversed(host):
        after.append(size or after[-1])
    after.reverse()
    return OnDevice(
        forward=[a + b for a, b in zip(before, host, strict=False)],
        head=before[-1],
        backward=[a + b for a, b in zip(before, after[:-1], strict=False)],
        after=after[0],
    )


@dataclass(eq=False)
class _Saved:
    """A contiguous stretch of memory that one or more saved tensors look at."""

    device_data: Tensor | None  # bytes, kept until their copy is done, and again once they are back
    num_bytes: int
    buffers: list[Tensor]
    copied: torch.cuda.Event
    returned: torch.cuda.Event | None = None

    def parts(self, data: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`data` on the device and the buffers, piece by piece."""
        for start, buffer in zip(range(0, self.num_bytes, LARGEST_BUFFER), self.buffers, strict=True):
            part = data[start : start + LARGEST_BUFFER]
            yield part, buffer[: part.numel()]


@dataclass
class _Layer:
    saved: dict[tuple[int, int], _Saved] = field(default_factory=dict)  # by address and bytes
    stays: frozenset[int] = frozenset()  # widths of matrices that stay on the device
    shared: frozenset[int] = frozenset()  # addresses of tensors that do


class HostMemory:
    """The pinned memory of one device's offloaded activations, and the stream of their copies.

    Buffers are kept from step to step: to pin memory takes far longer than to fill it. Batches differ a little in
    length: kept by exact size, every step would pin new ones, until the host has no memory left. So their sizes are
    powers of two, as PyTorch's allocator makes them anyway, and of large tensors one size that all share.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._layers: dict[int, _Layer] = {}
        self._free: dict[int, list[Tensor]] = {}  # pinned buffers by their bytes
        self._order: list[int] = []  # layers of this forward pass, first to last

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)

    def __reduce__(self):
        return HostMemory, (self.device,)  # a copied or saved layer has nothing in it

    @contextmanager
    def saving(self, index: int, stays: frozenset[int] = frozenset(), shared: Sequence[Tensor] = ()) -> Iterator[None]:
        """Offloads what is saved in this context, the forward pass of layer `index`.

        `stays`: widths of matrices that stay on the device. `shared`: tensors of all layers, which stay too.
        """
        if index in self._layers:  # a forward pass whose backward pass never came
            self._drop(index)
        self._layers[index] = _Layer(stays=stays, shared=frozenset(tensor.data_ptr() for tensor in shared))
        self._order.append(index)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._pack(index, tensor), self._unpack):
            yield
        self._release_copied(before=index)

    def _pack(self, index: int, tensor: Tensor):
        num_bytes = tensor.numel() * tensor.element_size()
        is_parameter = tensor.is_leaf and tensor.requires_grad
        if not tensor.is_cuda or num_bytes < SMALLEST or is_parameter or not tensor.is_contiguous():
            return tensor
        layer = self._layers[index]
        if tensor.data_ptr() in layer.shared or (tensor.dim() == 2 and tensor.shape[1] in layer.stays):
            return tensor
        key = (tensor.data_ptr(), num_bytes)
        if key not in layer.saved:
            layer.saved[key] = self._copy_out(tensor.detach().view(-1).view(torch.uint8), num_bytes)
        return layer, index, key, tensor.dtype, tensor.shape

    def _copy_out(self, data: Tensor, num_bytes: int) -> _Saved:
        buffers = [self._buffer(size) for size in pinned_buffers(num_bytes)]
        saved = _Saved(data, num_bytes, buffers, torch.cuda.Event())
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for part, on_host in saved.parts(data):
                on_host.copy_(part, non_blocking=True)
            saved.copied.record()
        return saved

    def _buffer(self, num_bytes: int) -> Tensor:
        free = self._free.get(num_bytes)
        return free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def _release_copied(self, before: int) -> None:
        """Lets go of the device memory of the layers before this one: the compute stream waits for their copies.

        The wait is on the device, and short: a layer's copies hide behind the next layer's forward pass, which is over.
        The last layer's stay for the backward pass, which begins with them.
        """
        for index in self._order[: self._order.index(before)] if before in self._order else []:
            for saved in self._layers[index].saved.values():
                if saved.device_data is not None and saved.returned is None:
                    torch.cuda.current_stream(self.device).wait_event(saved.copied)
                    saved.device_data = None

    def _unpack(self, packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        layer, index, key, dtype, shape = packed
        if index not in self._layers or self._layers[index] is not layer:
            raise RuntimeError(
                "activations on the host are kept for one backward pass, until the next forward pass: "
                "run each backward pass before the next forward pass, or set activation_policy='keep'."
            )
        place = self._order.index(index)
        for later in self._order[place + 1 :]:  # first, so that their memory is there for what comes back
            self._drop(later)
        self._fetch(index)
        if place > 0:
            self._fetch(self._order[place - 1])
        saved = layer.saved[key]
        assert saved.device_data is not None
        if saved.returned is not None:
            torch.cuda.current_stream(self.device).wait_event(saved.returned)
        return saved.device_data.view(dtype).view(shape)

    def _fetch(self, index: int) -> None:
        """Starts the copies of a layer back to the device, where they are not there yet."""
        for saved in self._layers[index].saved.values():
            if saved.device_data is not None:
                continue
            saved.device_data = torch.empty(saved.num_bytes, dtype=torch.uint8, device=self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may still be in use there
            with torch.cuda.stream(self.stream):
                for part, on_host in saved.parts(saved.device_data):
                    part.copy_(on_host, non_blocking=True)
                saved.returned = self.stream.record_event()

    def forget(self) -> None:
        """Lets go of all that is saved: the backward pass will not come, because memory ran out before it."""
        self.stream.synchronize()
        for index in list(self._layers):
            self._drop(index)

    def _drop(self, index: int) -> None:
        """The layer's backward pass is over: its host buffers are free for the next forward pass."""
        if index in self._order:
            self._order.remove(index)
        layer = self._layers.pop(index, _Layer())
        for saved in layer.saved.values():
            if saved.returned is not None:  # asked for and not used: the copy must not write into memory of others
                torch.cuda.current_stream(self.device).wait_event(saved.returned)
            for buffer in saved.buffers:
                self._free.setdefault(buffer.numel(), []).append(buffer)
        layer.saved.clear()  # a graph that nobody runs backward may hold on to the layer
