"""Corpora of tokens as a kind: what a scan of foreign shards looks for, and what verification reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ... import UsageError
from ...datamodules.corpora.index import CorpusIndex, Shard
from ...datamodules.corpora.tar import BLOCK_BYTES, Member, Sample
from ...datamodules.corpora.tokens import DTYPES, HEADER_BYTES, RowsHeader, TokenIndex, TokenShards, read_header
from ...datamodules.storage.random_access import Bytes, join, read_whole
from ...files import writing
from .base import Kind

ROWS_AT_ONCE = 1024
MASK = "mask.npy"
"""Member with the tokens of a sample that are to be predicted; it follows that of the tokens."""


@dataclass(frozen=True)
class TokenRows:
    """Token rows of a shard: rows of every member, their length and type, smallest and largest token, and masks."""

    rows: list[int]
    row_length: int
    dtype: str
    smallest: int
    largest: int
    masks: bool = False


class Tokens(Kind):
    """Shards of token rows: one ``.npy`` a sample, of shape (rows, sequence_length + 1) or (sequence_length + 1,).

    Args:
        tokenizer: Folder of the tokenizer that made them; without it the vocabulary is taken to end with the largest
            token that is there.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        self.tokenizer = tokenizer

    def load(self, folder: str | Path) -> TokenIndex:
        """Return the index of such a corpus."""
        return TokenIndex.load(folder)

    def offset(self, sample: Sample, where: str) -> int:
        """Return the offset of the header block right before the content, whatever extended headers stand before it."""
        return _npy(sample, where).begin - BLOCK_BYTES

    def read(self, samples: Sequence[Sample], content: Bytes, where: str) -> TokenRows:
        """Read every token once, for their range."""
        first = self._header(samples[0], content, where)
        rows, lows, highs = [], [], []
        masks = _has_mask(samples[0], where)
        for sample in samples:
            if _has_mask(sample, where) != masks:
                raise UsageError(
                    f"{where}: sample {sample.key!r} and the first one differ in whether they have a {MASK}"
                )
            member, header = _npy(sample, where), self._header(sample, content, where)
            if header.shape[1] != first.shape[1] or header.dtype != first.dtype:
                raise UsageError(
                    f"{where}: sample {sample.key!r} at byte {sample.begin} holds {header.dtype.name} rows of "
                    f"{header.shape[1]} tokens, the shard began with {first.dtype.name} rows of {first.shape[1]}"
                )
            rows.append(header.shape[0])
            tokens = np.frombuffer(content.read(member.begin + header.begin, member.begin + header.end), header.dtype)
            lows.append(int(tokens.min()))
            highs.append(int(tokens.max()))
        return TokenRows(rows, first.shape[1], first.dtype.name, min(lows), max(highs), masks)

    def rows(self, found: TokenRows) -> int:
        """Rows in all members."""
        return sum(found.rows)

    def index(
        self, folder: Path, shards: Sequence[Shard], found: Sequence[TokenRows], sources: tuple[str, ...]
    ) -> TokenIndex:
        """Check that shards fit together, and copy the tokenizer."""
        first = found[0]
        rows_per_sample = max(first.rows)
        if len({one.masks for one in found}) > 1:
            raise UsageError(f"some shards have a {MASK} in their samples, others not: index them by themselves")
        for shard, one in zip(shards, found, strict=True):
            if (one.row_length, one.dtype) != (first.row_length, first.dtype):
                raise UsageError(
                    f"{shard.name} holds {one.dtype} rows of {one.row_length} tokens, {shards[0].name} {first.dtype} "
                    f"rows of {first.row_length}: index them as corpora of their own"
                )
            if any(rows != rows_per_sample for rows in one.rows[:-1]) or one.rows[-1] > rows_per_sample:
                raise UsageError(
                    f"{shard.name}: its members hold {min(one.rows)} to {max(one.rows)} rows, expected "
                    f"{rows_per_sample} in each but the last; pack them again with `rewurst prepare text`"
                )
        vocab_size, end_token, sha256 = self._vocabulary(folder, shards, found)
        rows = sum(shard.rows for shard in shards)
        return TokenIndex(
            shards=tuple(shards),
            rows=rows,
            sources=sources,
            dtype=first.dtype,
            sequence_length=first.row_length - 1,
            rows_per_sample=rows_per_sample,
            tokens=rows * (first.row_length - 1),
            documents=0,
            dropped_tokens=0,
            vocab_size=vocab_size,
            end_token=end_token,
            tokenizer_sha256=sha256,
            masks=first.masks,
        )

    def open(self, folder: str) -> TokenShards:
        """Return the reader of tokens."""
        return TokenShards(folder)

    def check_rows(self, opened: TokenShards, rows: range) -> None:
        """Read every row."""
        for begin in range(rows.start, rows.stop, ROWS_AT_ONCE):
            opened.read(np.arange(begin, min(begin + ROWS_AT_ONCE, rows.stop)))
            opened.read_masks(np.arange(begin, min(begin + ROWS_AT_ONCE, rows.stop)))

    def problems(self, folder: str, index: CorpusIndex) -> list[str]:
        """Whether the copy of the tokenizer is the one that made the tokens."""
        assert isinstance(index, TokenIndex)
        path = join(folder, "tokenizer/tokenizer.json")
        try:
            sha256 = hashlib.sha256(read_whole(path)).hexdigest()
        except FileNotFoundError:
            missing = f"{path}: missing; the copy of the tokenizer belongs to the corpus"
            return [missing] if index.tokenizer_sha256 else []
        if sha256 == index.tokenizer_sha256:
            return []
        return [f"{path}: SHA-256 is {sha256}, expected {index.tokenizer_sha256}; the tokens were made by another one"]

    def _vocabulary(
        self, folder: Path, shards: Sequence[Shard], found: Sequence[TokenRows]
    ) -> tuple[int, int | None, str]:
        """Size, end token and hash of the tokenizer, against the tokens that are there."""
        largest, end_token, sha256 = max(one.largest for one in found), None, ""
        vocab_size = largest + 1
        if self.tokenizer is not None:
            from ...tokenizer_files import load_tokenizer

            files = load_tokenizer(self.tokenizer)
            vocab_size, end_token, sha256 = files.vocab_size, files.end_token, files.sha256
            with writing(folder):
                files.save(folder / "tokenizer")
        for shard, one in zip(shards, found, strict=True):
            token = one.smallest if one.smallest < 0 else one.largest
            if not 0 <= token < vocab_size:
                raise UsageError(f"{shard.name}: token {token} is outside the vocabulary of {vocab_size}")
        return vocab_size, end_token, sha256

    def _header(self, sample: Sample, content: Bytes, where: str) -> RowsHeader:
        member = _npy(sample, where)
        place = f"{where}: sample {sample.key!r} at byte {sample.begin}"
        try:
            header = read_header(content.read(member.begin, member.begin + min(HEADER_BYTES, member.size)))
        except ValueError as error:
            raise UsageError(f"{place}: no readable npy header ({str(error).splitlines()[0]})") from None
        little = header.dtype.newbyteorder("<") == header.dtype
        if header.dtype.name not in DTYPES or not little or len(header.shape) != 2 or header.fortran_order:
            raise UsageError(
                f"{place}: holds {header.dtype.str} of shape {header.shape}, expected little-endian "
                f"{' or '.join(DTYPES)} of shape (rows, sequence_length + 1) in C order"
            )
        if not min(header.shape) or header.end > member.size:
            raise UsageError(f"{place}: its array is empty or ends before its rows do")
        return header


def _has_mask(sample: Sample, where: str) -> bool:
    """Return whether a sample has a mask, which has to follow its tokens."""
    names = [member.extension for member in sample.members]
    if MASK in names and not (names.index(MASK) and names[names.index(MASK) - 1].endswith("npy")):
        raise UsageError(f"{where}: sample {sample.key!r}: its {MASK} has to follow its tokens")
    return MASK in names


def _npy(sample: Sample, where: str) -> Member:
    members = [member for member in sample.members if member.extension != MASK]
    arrays = [member for member in members if member.extension.rsplit(".", 1)[-1] == "npy"]
    if len(arrays) != 1:
        found = ", ".join(member.extension for member in sample.members)
        raise UsageError(
            f"{where}: sample {sample.key!r} at byte {sample.begin} holds {found}, expected one .npy of token rows"
        )
    return arrays[0]
