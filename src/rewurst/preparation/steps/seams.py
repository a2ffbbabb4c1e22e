"""Encode a text in windows, with the tokens that it has as a whole.

A tokenizer sees a piece of a text as a text of its own: it may put a space in front, or split a word at the cut.
Neighboring windows therefore overlap. The overlap is encoded alone too: its last tokens are those of the window before
it, its first ones those of the window after it. Where both agree, the tokens of one window follow those of the other.
For BPE this gives the tokens of the whole text: an encoding is the right one if each pair of neighbors in it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ... import UsageError

WINDOW_CHARS = 2**16  # an encoding takes about 150 bytes per token, and a character can be four tokens
OVERLAP_CHARS = 512
AGREEING_TOKENS = 8  # on each side of a seam, in both windows

Encode = Callable[[str], list[int]]


class Joint(NamedTuple):
    """An overlap at an end of a text, and how many of its tokens belong to the neighboring text."""

    chars: int = 0
    tokens: int = 0


class Split(NamedTuple):
    """Where a long text is split in two that overlap.

    Attributes:
        end: End of the first text.
        begin: Beginning of the second text.
        tail: Overlap at the end of the first text.
        head: Overlap at the beginning of the second text.
    """

    end: int
    begin: int
    tail: Joint
    head: Joint


def encode_whole(text: str, encode: Encode) -> list[int]:
    """Return the tokens of a text of any length, as if it had been encoded at once.

    Args:
        text: Text to encode.
        encode: Function that encodes a text at once.
    """
    window, overlap = WINDOW_CHARS, OVERLAP_CHARS
    while (tokens := _in_windows(text, encode, window, overlap)) is None:
        window, overlap = 4 * window, 8 * overlap
    return tokens


def split(text: str, encode: Encode, near: int) -> Split | None:
    """Return a split of a text close to a position, None if no two windows agree there.

    Args:
        text: Text to split; what follows ``near`` is the context.
        encode: Function that encodes a text at once.
        near: End of the first part.
    """
    overlap = OVERLAP_CHARS
    while 10 * overlap < near:
        context = 8 * overlap + 5  # odd: a run of one character must not agree because the windows are even
        begin = near - overlap
        both = encode(text[begin:near])
        before, after = encode(text[begin - context : near]), encode(text[begin : near + context])
        if (first := _seam(before, both, after)) is not None:
            return Split(near, begin, Joint(overlap, len(both) - first), Joint(overlap, first))
        overlap *= 8
    return None


def without_joints(tokens: list[int], text: str, encode: Encode, head: Joint, tail: Joint) -> list[int]:
    """Return the tokens of a text that do not belong to its neighbors.

    Raises:
        UsageError: The tokens at an end are not those that the split was made for.
    """
    end = len(tokens) - tail.tokens
    for joint, at_end in ((head, False), (tail, True)):
        if joint.chars:
            overlap = encode(text[-joint.chars :] if at_end else text[: joint.chars])
            count = joint.tokens + AGREEING_TOKENS
            same = tokens[-count:] == overlap[-count:] if at_end else tokens[:count] == overlap[:count]
            if not same:
                raise UsageError(
                    f"a document of more than {len(text)} characters cannot be split for this tokenizer near "
                    f"{text[: joint.chars][:40]!r}; split it into several documents"
                )
    return tokens[head.tokens : end]


def _in_windows(text: str, encode: Encode, window: int, overlap: int) -> list[int] | None:
    end, found = window, list[int]()
    tokens = encode(text[:end])
    while end < len(text):
        begin, end = end - overlap, end + window
        following, both = encode(text[begin:end]), encode(text[begin : begin + overlap])
        first = _seam(tokens, both, following)
        if first is None:
            return None
        found += tokens[: len(tokens) - (len(both) - first)]
        tokens = following[first:]
    return found + tokens


def _seam(before: Sequence[int], overlap: Sequence[int], after: Sequence[int]) -> int | None:
    """Return the number of tokens of an overlap that belong to the window before it."""
    least = len(overlap) - _common(before[::-1], overlap[::-1]) + AGREEING_TOKENS
    most = _common(overlap, after) - AGREEING_TOKENS
    return (least + most) // 2 if least <= most else None


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    for i in range(min(len(one), len(other))):
        if one[i] != other[i]:
            return i
    return min(len(one), len(other))
