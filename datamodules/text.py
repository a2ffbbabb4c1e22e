"""Token rows of named corpora as exact global batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from .. import UsageError
from .base import Corpus, StreamDataModule
from .corpora.tokens import TokenShards
from .sampling.micro_batches import Batch, Picks, Reader

__all__ = ["Corpus", "TextDataModule"]


class TextDataModule(StreamDataModule[TokenShards]):
    """Rows of tokens from named corpora, with replay of old ones, as the same global batches on any machine.

    A training batch is a dict of ``input_ids`` (rows, sequence_length + 1), a tensor, and of NumPy arrays (rows,) that
    say where they come from: ``corpus``, numbered with the new corpora first, and ``row`` in it. Validation batches are
    tensors: ``input_ids``, ``row`` and ``valid`` (rows,), which is 0 for rows that only fill up. Validation loaders are
    a dict by corpus. Modules get ``input_ids`` as int64; a loader that is iterated without a Trainer gives them in the
    dtype of the shards, such as uint16, for ``.long()``.

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        corpora: Training corpora by name. Old data keeps its name, so that it comes in the order of its first reading.
        val: Folders of validation corpora by name.
        sequence_length: Tokens predicted a row, as prepared.
        micro_batch_size: Rows in one forward pass of one device.
        global_batch_size: Rows in one optimizer step; gradient accumulation follows from it.
        num_workers: Loader processes of each device.
        seed: Seed of the order.
        shuffle: ``"full"`` over all rows, or ``"window"``, which reads blocks of neighbouring rows.

    Raises:
        UsageError: Sizes that do not divide, corpora that differ in tokenizer or sequence length, a checkpoint of the
            same dataset with other data.
    """

    def __init__(
        self,
        dataset: str,
        corpora: dict[str, Corpus],
        val: dict[str, str],
        sequence_length: int,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: Literal["full", "window"] = "full",
    ) -> None:
        super().__init__(dataset, corpora, val, micro_batch_size, global_batch_size, num_workers, seed, shuffle)
        self.sequence_length = sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in a global batch."""
        return self.global_batch_size * self.sequence_length

    @property
    def vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary."""
        return next(iter(self._opened.values())).index.vocab_size

    @property
    def end_token(self) -> int | None:
        """The token that ends a document, none where a foreign corpus does not say."""
        return next(iter(self._opened.values())).index.end_token

    @property
    def begin_tokens(self) -> tuple[int, ...]:
        """Tokens before each document, such as a BOS."""
        return next(iter(self._opened.values())).index.begin_tokens

    @property
    def tokenizer_folder(self) -> str:
        """The tokenizer that lies beside the first corpus."""
        return next(iter(self._opened.values())).tokenizer_folder

    def state_dict(self) -> dict[str, Any]:
        """Return what every stream keeps, where the tokenizer is, and the tokens around each document."""
        tokens = {"end_token": self.end_token, "begin_tokens": list(self.begin_tokens)}
        return super().state_dict() | {"tokenizer": self.tokenizer_folder, **tokens}

    def open_corpus(self, name: str, path: str) -> TokenShards:
        """Opens a corpus; all of them have one tokenizer and one length of rows."""
        shards = TokenShards(path)
        first = next(iter(self._opened.values()), shards)
        if shards.index.sequence_length != self.sequence_length:
            raise UsageError(
                f"corpus {name!r} ({path}) has rows of sequence_length {shards.index.sequence_length}, asked for is "
                f"{self.sequence_length}: prepare it again, or set sequence_length to that"
            )
        if not shards.has_tokenizer_of(first):
            raise UsageError(f"corpus {name!r} ({path}) was prepared with another tokenizer than {first.path}")
        for what in ("end_token", "begin_tokens"):
            here, there = getattr(shards.index, what), getattr(first.index, what)
            if here != there and here is not None and there is not None:
                rank_zero_warn(
                    f"corpus {name!r} ({path}) was prepared with {what} {here}, {first.path} with {there}: prepare one "
                    "of them again, or the model learns both"
                )
        return shards

    def example_batch(self, micro_batch_size: int) -> Batch:
        """Return a batch of zeros; no corpus is needed."""
        places = np.zeros(micro_batch_size, dtype=np.int64)
        ids = torch.zeros(micro_batch_size, self.sequence_length + 1, dtype=torch.long)
        return {"input_ids": ids, "corpus": places, "row": places}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Widens tokens on the device: as stored they are a quarter of the bytes that workers and copies move."""
        return batch | {"input_ids": batch["input_ids"].long()}

    def reader(self, sources: Sequence[TokenShards]) -> Reader:
        """Reads tokens."""
        return TokenReader(sources)


class TokenReader:
    """Read ``input_ids`` (rows, sequence_length + 1), in the dtype of the shards, and ``mask`` if a corpus has masks.

    Args:
        sources: Corpora, as picks number them.
    """

    def __init__(self, sources: Sequence[TokenShards]) -> None:
        self._sources = sources
        self._smallest = min(source.index.vocab_size for source in sources)

    def __call__(self, picks: Picks) -> Batch:
        """Reads the rows of a micro-batch."""
        return {"input_ids": self._tokens(picks), **self._masks(picks)}

    def _masks(self, picks: Picks) -> Batch:
        """Return which tokens are to be predicted, nothing if no corpus says so."""
        if not any(source.index.masks for source in self._sources):
            return {}
        mask = np.ones((len(picks.row), self._sources[0].index.sequence_length + 1), dtype=np.bool_)
        for index, shards in enumerate(self._sources):
            slots = np.flatnonzero(picks.corpus == index) if len(self._sources) > 1 else np.arange(len(picks.row))
            mask[slots] = shards.read_masks(picks.row[slots])
        return {"mask": torch.from_numpy(mask)}

    def _tokens(self, picks: Picks) -> torch.Tensor:
        if len(self._sources) == 1:
            return torch.from_numpy(self._sources[0].read(picks.row))
        shape = (len(picks.row), self._sources[0].index.sequence_length + 1)
        tokens = np.empty(shape, dtype=np.result_type(*(source.index.dtype for source in self._sources)))
        for index, shards in enumerate(self._sources):
            slots = np.flatnonzero(picks.corpus == index)
            shards.read_into(tokens, slots.tolist(), picks.row[slots])
        if tokens.max() >= self._smallest or (tokens.dtype.kind == "i" and tokens.min() < 0):
            for index, shards in enumerate(self._sources):  # whose rows they are, and whether its vocabulary is larger
                shards.read(picks.row[picks.corpus == index])
        return torch.from_numpy(tokens)
