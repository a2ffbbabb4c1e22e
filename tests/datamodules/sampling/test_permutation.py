"""The order of rows is a bijection for every size and never changes."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewurst.datamodules.sampling.permutation import CorpusOrder, permute, round_keys


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**40))
def test_permutations_hit_every_element_once(size: int, seed: int) -> None:
    permuted = permute(np.arange(size), size, round_keys(seed, "corpus", 0, "rows"))
    assert sorted(permuted.tolist()) == list(range(size))


def slow_permute(index: int, size: int, seed: int, corpus: str, epoch: int) -> int:
    """Permute one element at a time with the documented network on Python's integers."""
    text = f"{seed}\0{corpus}\0{epoch}\0rows".encode()
    digest = hashlib.blake2b(text, digest_size=64).digest()
    bits = max(1, (size - 1).bit_length())
    right_bits = max(1, bits // 2)
    word = 2**64 - 1

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
        return value ^ (value >> 31)

    while True:
        left, right = index >> right_bits, index & (2**right_bits - 1)
        for number in range(8):
            key = int.from_bytes(digest[8 * number : 8 * number + 8], "little")
            if number % 2:
                right ^= mix(left ^ key) & (2**right_bits - 1)
            else:
                left ^= mix(right ^ key) & (2 ** (bits - right_bits) - 1)
        index = (left << right_bits) | right
        if index < size:
            return index


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 10**9), seed=st.integers(0, 99), epoch=st.integers(0, 9), data=st.data())
def test_the_vectorized_network_equals_the_documented_one(
    size: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    index = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    permuted = CorpusOrder("prose", size, seed).row(np.array(index) + epoch * size)
    assert permuted.tolist() == [slow_permute(i, size, seed, "prose", epoch) for i in index]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 2000),
    block=st.integers(1, 50),
    window=st.integers(1, 8),
    shuffle=st.sampled_from(["full", "window"]),
    epoch=st.integers(0, 5),
)
def test_every_row_occurs_exactly_once_per_epoch(
    rows: int, block: int, window: int, shuffle: Literal["full", "window"], epoch: int
) -> None:
    order = CorpusOrder("prose", rows, 3, shuffle, block, window)
    counters = np.arange(epoch * rows, (epoch + 1) * rows)
    assert sorted(order.row(counters).tolist()) == list(range(rows))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=5).map(sorted), shuffle=st.sampled_from(["full", "window"]))
def test_the_order_does_not_depend_on_the_size_of_requests(cuts: list[int], shuffle: Literal["full", "window"]) -> None:
    order = CorpusOrder("prose", 100, 0, shuffle, block=7, window=3)
    pieces = np.split(np.arange(300), cuts)
    assert np.concatenate([order.row(piece) for piece in pieces]).tolist() == order.row(np.arange(300)).tolist()


def test_seed_corpus_and_epoch_each_change_the_order() -> None:
    first = CorpusOrder("prose", 500, 0).row(np.arange(1000))
    others = [CorpusOrder("prose", 500, 1), CorpusOrder("code", 500, 0)]
    orders = [first[:500], first[500:], *(order.row(np.arange(500)) for order in others)]
    for index, order in enumerate(orders):
        for other in orders[:index]:
            assert (order == other).mean() < 0.02  # chance is 1 in 500


def test_a_window_touches_few_blocks() -> None:
    order = CorpusOrder("prose", 100 * 64, 0, "window", block=64, window=4)
    rows = order.row(np.arange(4 * 64))
    assert len(set((rows // 64).tolist())) == 4
    assert (np.diff(rows) == 1).mean() < 0.05, "rows are shuffled within the window"


def test_neighbors_and_parities_are_mixed() -> None:
    rows = CorpusOrder("prose", 4096, 0).row(np.arange(4096))
    assert abs(np.corrcoef(rows, np.arange(4096))[0, 1]) < 0.05
    assert abs((rows % 2 == np.arange(4096) % 2).mean() - 0.5) < 0.05
    halves = (rows < 2048).reshape(64, 64).sum(1)
    assert halves.std() < 1.5 * 4.0  # a fair draw has sqrt(64)/2 = 4


@pytest.mark.parametrize(
    ("shuffle", "expected"),
    [("full", [78, 98, 95, 60, 71, 2, 62, 74]), ("window", [37, 36, 32, 33, 31, 51, 53, 32])],
)
def test_the_order_never_changes(shuffle: Literal["full", "window"], expected: list[int]) -> None:
    """Golden values: an upgrade that changes them would silently change every running training."""
    assert CorpusOrder("prose", 100, 0, shuffle, block=10, window=3).row(np.arange(96, 104)).tolist() == expected
