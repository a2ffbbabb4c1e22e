"""Compute the order of samples as a pure function: counter of a corpus -> epoch and index -> permuted row.

1. A corpus is read by a counter that never restarts: ``epoch = counter // rows``, ``index = counter % rows``. In replay
   the counter repeats the first reading of the corpus.
2. Each epoch permutes the rows by a keyed Feistel network with cycle walking. There is no table and no generator
   state: any position costs the same, and the keys are hashes of (seed, corpus, epoch).
3. ``"full"`` permutes all rows. ``"window"`` permutes blocks of neighboring rows, then rows within a window of
   consecutive permuted blocks, so that a stream reads from few places at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
ROUNDS = 8
GOLDEN_SECTION = (5**0.5 - 1) / 2


def permute(index: Rows, size: int, keys: NDArray[np.uint64]) -> Rows:
    """Permute elements of ``range(size)`` by a keyed bijection.

    An alternating Feistel network over the smallest power of two that holds ``size``; results outside are permuted
    again until they fall inside (cycle walking), which takes under two rounds on average.

    Args:
        index: Values in ``[0, size)``, any shape.
        size: Number of elements of the permutation.
        keys: Round keys, :data:`ROUNDS` of them.
    """
    if size <= 1:
        return index.copy()
    bits = (size - 1).bit_length()
    result = _feistel(index.astype(np.uint64), bits, keys)
    outside = result >= size
    while outside.any():
        result[outside] = _feistel(result[outside], bits, keys)
        outside = result >= size
    return result.astype(np.int64)


@lru_cache(maxsize=256)
def round_keys(seed: int, corpus: str, epoch: int, purpose: str) -> NDArray[np.uint64]:
    """Return round keys, a BLAKE2b hash of the arguments."""
    text = f"{seed}\0{corpus}\0{epoch}\0{purpose}".encode()
    keys = np.frombuffer(hashlib.blake2b(text, digest_size=8 * ROUNDS).digest(), dtype="<u8").astype(np.uint64)
    keys.flags.writeable = False
    return keys


def slot_seeds(seed: int, step: int, slots: Rows) -> Rows:
    """Return a 63-bit seed for each slot of a step, for its sample's randomness: crop, dropout, noise.

    Seeds do not depend on ranks, workers or micro-batches.

    Args:
        seed: Seed of the run.
        step: Step of the global batch.
        slots: Slots in the global batch, ``(n,)``.
    """
    key = round_keys(seed, "", step, "slots")[0]
    return (_mix(slots.astype(np.uint64) ^ key) >> np.uint64(1)).astype(np.int64)


def slot_quantiles(seed: int, step: int, slots: Rows) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each slot of a step: each is uniform, and together they are evenly spread.

    A random number per step is shifted by multiples of the golden section, which leave no large gaps. This is the
    low-discrepancy sampler of Kingma et al. 2021 (arXiv 2107.00630, appendix I.1) without the batch size, so that, like
    :func:`slot_seeds`, it does not depend on ranks, workers or micro-batches.

    Args:
        seed: Seed of the run.
        step: Step of the global batch.
        slots: Slots in the global batch, ``(n,)``.
    """
    offset = float(round_keys(seed, "", step, "quantiles")[0] >> np.uint64(11)) / 2**53
    quantiles: NDArray[np.float64] = (offset + slots.astype(np.float64) * GOLDEN_SECTION) % 1.0
    return quantiles


@dataclass(frozen=True)
class CorpusOrder:
    """Order in which one corpus is read.

    Args:
        corpus: Name of the corpus; with the seed it decides the order.
        rows: Number of rows.
        seed: Seed of the run.
        shuffle: Kind of shuffle: ``"full"`` over all rows, or ``"window"`` for streams.
        block: Number of rows per block of the window shuffle.
        window: Number of blocks per window of the window shuffle.
        first_reading: Number of rows read when the corpus was learned; replay repeats them in that order.
        offset: Number of those rows that earlier datasets have replayed.
    """

    corpus: str
    rows: int
    seed: int
    shuffle: Literal["full", "window"] = "full"
    block: int = 256
    window: int = 64
    first_reading: int | None = None
    offset: int = 0

    def row(self, counters: Rows) -> Rows:
        """Return the row of each counter; every row occurs once per epoch.

        Args:
            counters: Number of samples of this corpus read before, ``(n,)``.
        """
        counters = counters + self.offset
        if self.first_reading is not None:
            counters = counters % self.first_reading
        epochs, index = np.divmod(counters, self.rows)
        shuffle = self._full if self.shuffle == "full" else self._window
        if epochs.size and epochs[0] == epochs.min() == epochs.max():
            return shuffle(int(epochs[0]), index)
        result = np.empty_like(index)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            result[of_epoch] = shuffle(int(epoch), index[of_epoch])
        return result

    def _full(self, epoch: int, index: Rows) -> Rows:
        return permute(index, self.rows, round_keys(self.seed, self.corpus, epoch, "rows"))

    def _window(self, epoch: int, index: Rows) -> Rows:
        """Shuffle within each window, then map permuted blocks to rows; a short last block stays last."""
        index = index.copy()
        size = self.block * self.window
        windows = index // size
        for window in np.unique(windows):
            inside = windows == window
            begin = int(window) * size
            keys = round_keys(self.seed, self.corpus, epoch, f"window {window}")
            index[inside] = begin + permute(index[inside] - begin, min(size, self.rows - begin), keys)
        blocks, within = np.divmod(index, self.block)
        whole = self.rows // self.block
        full = blocks < whole
        keys = round_keys(self.seed, self.corpus, epoch, "blocks")
        blocks[full] = permute(blocks[full], whole, keys)
        return blocks * self.block + within


def _feistel(value: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    right_bits = np.uint64(max(bits // 2, 1))
    left_mask = np.uint64((1 << (bits - int(right_bits))) - 1)
    right_mask = np.uint64((1 << int(right_bits)) - 1)
    left, right = value >> right_bits, value & right_mask
    for number, key in enumerate(keys):
        if number % 2:
            right ^= _mix(left ^ key) & right_mask
        else:
            left ^= _mix(right ^ key) & left_mask
    return (left << right_bits) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood 2014): every input bit affects every output bit.

    Products wrap around, silently for NumPy arrays (with a warning for scalars).
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
