"""Lengths -> packs of documents of at most `capacity` tokens.

Decreasing and bin by bin: a pack takes the longest document left, then the longest that fits, and so on, and as soon as
two of the lengths left fill the rest exactly, those two end it. Of several such pairs the most equal one is taken: it
leaves the short documents, which fill later packs, alone. On GSM8K at 2,048 tokens this fills 99.8%, where plain
best-fit or first-fit decreasing fills 98.8%.

The number of packs, and which lengths meet in a pack, depend on the lengths alone. Seed and epoch decide which of the
documents of a length takes which place, and the order of packs and inside packs: every epoch has as many steps.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from truetune.data.errors import DataError


def pack(
    lengths: Sequence[int] | np.ndarray, capacity: int, *, seed: int = 0, epoch: int | tuple[int, ...] = 0
) -> list[list[int]]:
    """Packs of document indexes: every document once, at most `capacity` tokens each; a pure function.

    A million documents take one or two seconds. Raises DataError for a length of 0 or over `capacity`.
    """
    lengths_D = np.asarray(lengths, dtype=np.int64)
    if not lengths_D.size:
        return []
    if lengths_D.min() < 1:
        raise DataError(f"document {lengths_D.argmin()} has no tokens: drop empty documents before packing")
    if lengths_D.max() > capacity:
        raise DataError(
            f"document {lengths_D.argmax()} has {lengths_D.max()} tokens, but a pack holds {capacity}: truncate or "
            "split longer documents before packing"
        )
    slots: list[int] = []  # the lengths of all packs, back to back
    sizes: list[int] = []  # documents in each pack
    for shape, times in _shapes(lengths_D, min(capacity, int(lengths_D.sum()))):
        slots += shape * times
        sizes += [len(shape)] * times

    # Sorting by a bit generator's raw numbers: their stream never changes between NumPy versions, unlike a Generator's
    # permutation (NEP 19), so that a run resumed after an upgrade sees the packs that it began with.
    random = np.random.PCG64([seed, *np.atleast_1d(epoch)])
    document_by_length = np.lexsort((random.random_raw(len(slots)), lengths_D))
    document_of_slot = np.empty(len(slots), np.int64)
    document_of_slot[np.argsort(slots, kind="stable")] = document_by_length
    place_of_pack = np.argsort(random.random_raw(len(sizes)))
    order = np.lexsort((random.random_raw(len(slots)), np.repeat(place_of_pack, sizes)))

    documents = document_of_slot[order].tolist()
    ends = np.asarray(sizes)[np.argsort(place_of_pack)].cumsum().tolist()
    return [documents[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _shapes(lengths_D: np.ndarray, capacity: int) -> Iterator[tuple[list[int], int]]:
    """The lengths in a pack, and how many packs hold just those, until all lengths are used up."""
    count = np.bincount(lengths_D).tolist()
    # The lengths left as bits of two integers: bit l of `stock`, bit capacity - l of `mirror`. Shifted right by
    # capacity - room, the mirror has bit l where room - l is left: what it shares with the stock are the pairs that
    # fill the room.
    stock = sum(1 << length for length, left in enumerate(count) if left)
    mirror = sum(1 << (capacity - length) for length, left in enumerate(count) if left)

    def use(length: int, times: int) -> None:
        nonlocal stock, mirror
        count[length] -= times
        if not count[length]:
            stock ^= 1 << length
            mirror ^= 1 << (capacity - length)

    while stock:
        shape: list[int] = []
        room = capacity
        while fits := stock & ((2 << room) - 1):
            longest = fits.bit_length() - 1
            half = (room + 1) // 2
            longer_halves = (stock & (mirror >> (capacity - room))) >> half
            if longer_halves & 1 and 2 * half == room and count[half] == 1:
                longer_halves ^= 1  # one document is no pair
            if longest < room and longer_halves:
                longer = half + (longer_halves & -longer_halves).bit_length() - 1
                chosen = [longer, room - longer]
            else:
                chosen = [longest]
            for length in chosen:
                use(length, 1)
            shape += chosen
            room -= sum(chosen)
        # While its lengths last, the same choices give the same pack: take all of those at once.
        needed = Counter(shape)
        again = min(count[length] // times for length, times in needed.items())
        if again:
            for length, times in needed.items():
                use(length, again * times)
        yield shape, 1 + again


def pack_stream(
    documents: Iterable[Any], capacity: int | None, buffer: int, *, seed: int = 0, epoch: int = 0
) -> Iterator[list[Any]]:
    """Packs of documents (mappings with `input_ids`) from a stream, out of the next `buffer` documents at a time.

    The emptiest pack waits for the next documents. A pure function, of which seed and epoch decide what they decide in
    `pack`; without a capacity every document is a pack. Raises DataError as `pack` does.
    """
    if buffer < 1:
        raise DataError(f"a packing buffer holds at least one document, not {buffer}")
    stream = iter(documents)
    waiting: list[Any] = []
    refill = 0
    while fresh := list(islice(stream, buffer)):
        held = waiting + fresh
        lengths = [1 if capacity is None else len(document["input_ids"]) for document in held]
        packs = pack(lengths, capacity or 1, seed=seed, epoch=(epoch, refill))
        emptiest = packs.pop(min(range(len(packs)), key=lambda i: sum(lengths[d] for d in packs[i])))
        waiting = [held[d] for d in emptiest]
        yield from ([held[d] for d in indexes] for indexes in packs)
        refill += 1
    if waiting:
        yield waiting


class PackSampler(Sampler[list[int]]):
    """Yields the packs of an epoch, each a list of document indexes; there are as many in every epoch."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, capacity: int, seed: int = 0):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.capacity = capacity
        self.seed = seed
        self.epoch = 0
        self._num_packs = len(pack(self.lengths, capacity))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_packs

    def __iter__(self) -> Iterator[list[int]]:
        yield from pack(self.lengths, self.capacity, seed=self.seed, epoch=self.epoch)

    @property
    def efficiency(self) -> float:
        """The share of the packs' places that hold a token."""
        return float(self.lengths.sum()) / max(1, len(self) * self.capacity)
