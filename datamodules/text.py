"""Token rows of named corpora as exact global batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from .. import UsageError
from ..tokenizer_files import load_tokenizer
from .base import Corpus, StreamDataModule
from .corpora.tokens import TokenShards
from .sampling.micro_batches import Batch, Reader, SampleIndices
from .sources import SourceOptions, row_length
from .streaming.token_stream import TokenStream

__all__ = ["Corpus", "TextDataModule"]

TokenRows = TokenShards | TokenStream
OLD = "old"  # name of the corpus of a replay_source


class TextDataModule(StreamDataModule[TokenRows]):
    """Rows of tokens from named corpora, with replay of old ones, as the same global batches on any machine.

    A training batch is a dict of ``input_ids`` (rows, sequence_length + 1), a tensor, and of NumPy arrays (rows,) that
    say where they come from: ``corpus``, numbered with the new corpora first, and ``row`` in it. Validation batches are
    tensors: ``input_ids``, ``row`` and ``valid`` (rows,), which is 0 for rows that only fill up. Validation loaders are
    a dict by corpus. Modules get ``input_ids`` as int64; a loader that is iterated without a Trainer gives them in the
    dtype of the shards, such as uint16, for ``.long()``.

    Args:
        dataset: Name of what is being learnt; another name later means another dataset.
        corpora: Training corpora by name. Old data keeps its name, so that it comes in the order of its first reading.
            A corpus with a ``source`` is prepared before training, once for all runs, and its held-out documents are a
            validation corpus of the same name. A corpus with a ``stream`` is read from front to back, see
            :class:`.streaming.token_stream.TokenStream`.
        val: Folders of validation corpora by name.
        sequence_length: Tokens predicted a row, as prepared (default, for sources: what the model can see, up to 1024).
        micro_batch_size: Rows in one forward pass of one device.
        global_batch_size: Rows in one optimizer step; gradient accumulation follows from it.
        num_workers: Loader processes of each device.
        seed: Seed of the order.
        shuffle: ``"full"`` over all rows, or ``"window"``, which reads blocks of neighbouring rows.
        validate_every_n_steps: Steps between validations. Lightning's own ``val_check_interval`` counts micro-batches.
        source: Text to learn: files, folders, URLs or built-in corpora, as `rewurst prepare text` takes them. It is a
            corpus with the dataset's name.
        replay_source: Old text to replay, a corpus named ``old``.
        tokenizer: Folder or hub name of the tokenizer for sources (default: the model's own).
        held_out: Share of the documents of sources for validation.
        text_field: Field or column with the text in sources.
        document_separator: What separates the documents of a plain text file in sources, such as ``blank-line``
            (default: a file is one document).
        cache_dir: Folder of prepared sources (default: REWURST_CORPORA_DIR, or ~/.cache/rewurst/corpora).

    Raises:
        UsageError: Sizes that do not divide, corpora that differ in tokenizer or sequence length, a checkpoint of the
            same dataset with other data.
    """

    def __init__(
        self,
        dataset: str,
        corpora: dict[str, Corpus],
        val: dict[str, str],
        sequence_length: int | None,
        micro_batch_size: int,
        global_batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        shuffle: Literal["full", "window"] = "full",
        validate_every_n_steps: int | None = None,
        source: str | list[str] | None = None,
        replay_source: str | list[str] | None = None,
        tokenizer: str | None = None,
        held_out: float = 0.05,
        text_field: str = "text",
        document_separator: str | None = None,
        cache_dir: str | None = None,
    ) -> None:
        corpora = _with_sources(corpora, dataset, source, replay_source)
        sizes = (micro_batch_size, global_batch_size, num_workers)
        super().__init__(dataset, corpora, dict(val), *sizes, seed, shuffle, validate_every_n_steps)
        self._sequence_length = sequence_length
        self._options = SourceOptions(tokenizer, held_out, text_field, document_separator, cache_dir)
        self._folders: dict[str, str] = {}

    @property
    def sequence_length(self) -> int:
        """Tokens predicted per row.

        Raises:
            UsageError: It follows from a model that is not known yet.
        """
        if self._sequence_length is None:
            raise UsageError("sequence_length is not set, and no model is known that it could follow from; set it")
        return self._sequence_length

    def prepare_data(self) -> None:
        """Prepare the sources, unless an earlier run has; Lightning calls it in the first process of a machine."""
        module = None if self.trainer is None else self.trainer.lightning_module
        sources = {name: corpus.source for name, corpus in self.corpora.items() if corpus.source}
        streams = any(corpus.stream for corpus in self.corpora.values())
        if (sources or streams) and self._sequence_length is None:
            self._sequence_length = row_length(module)
        for name, source in sources.items():
            self._folders[name] = str(self._options.prepare(source, module, self.sequence_length))

    def setup(self, stage: str) -> None:
        """Open the corpora, those of sources where they have been prepared."""
        if any(corpus.source or corpus.stream for corpus in self.corpora.values()):
            if self.trainer is None and not self._folders:
                self.prepare_data()
            self._use_prepared()
        super().setup(stage)

    def _use_prepared(self) -> None:
        if self.trainer is not None:  # only the first process of a machine has prepared them
            found = self.trainer.strategy.broadcast((self._folders, self._sequence_length))
            self._folders, self._sequence_length = found
        for name, folder in self._folders.items():
            self.corpora[name] = replace(self.corpora[name], path=f"{folder}/train", source=None)
            if self._options.held_out:
                self.val.setdefault(name, f"{folder}/val")

    prepares_sources = True

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
        """Folder of the tokenizer next to the first corpus."""
        return next(iter(self._opened.values())).tokenizer_folder

    def state_dict(self) -> dict[str, Any]:
        """Return what every stream keeps, where the tokenizer is, and the tokens around each document."""
        tokens = {"end_token": self.end_token, "begin_tokens": list(self.begin_tokens)}
        return super().state_dict() | {"tokenizer": self.tokenizer_folder, **tokens}

    def open_corpus(self, name: str, path: str) -> TokenRows:
        """Open a corpus; all of them have one tokenizer and one length of rows."""
        urls = self.streamed_tars(name, path)
        shards = TokenShards(path) if urls is None else self._open_stream(name, path, urls)
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

    def _open_stream(self, name: str, path: str, urls: Sequence[str]) -> TokenStream:
        module = None if self.trainer is None else self.trainer.lightning_module
        tokenizer = load_tokenizer(self._options.tokenizer_of(module, path))
        return TokenStream(
            name, path, urls, tokenizer, self.sequence_length, self._options.text_field, self._options.folder
        )

    def example_batch(self, micro_batch_size: int) -> Batch:
        """Return a batch of zeros; no corpus is needed."""
        places = np.zeros(micro_batch_size, dtype=np.int64)
        ids = torch.zeros(micro_batch_size, self.sequence_length + 1, dtype=torch.long)
        return {"input_ids": ids, "corpus": places, "row": places}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Widens tokens on the device: as stored they are a quarter of the bytes that workers and copies move."""
        return batch | {"input_ids": batch["input_ids"].long()}

    def reader(self, sources: Sequence[TokenRows]) -> Reader:
        """Return the function that reads tokens."""
        return TokenReader(sources)


def _with_sources(
    corpora: Mapping[str, Corpus],
    dataset: str,
    source: str | list[str] | None,
    replay_source: str | list[str] | None,
) -> dict[str, Corpus]:
    """Return the corpora with those that are named by their sources alone."""
    whole = dict(corpora)
    for name, given, replay in ((dataset, source, False), (OLD, replay_source, True)):
        if given:
            if name in whole:
                raise UsageError(f"corpus {name!r} is given twice, by corpora and by a source; rename one of them")
            whole[name] = Corpus(source=given, replay=replay)
    return whole


class TokenReader:
    """Read ``input_ids`` (rows, sequence_length + 1), in the dtype of the shards, and ``mask`` if a corpus has masks.

    Args:
        sources: Corpora, as picks number them.
    """

    def __init__(self, sources: Sequence[TokenRows]) -> None:
        self._sources = sources
        self._smallest = min(source.index.vocab_size for source in sources)

    def __call__(self, picks: SampleIndices) -> Batch:
        """Read the rows of a micro-batch."""
        return {"input_ids": self._tokens(picks), **self._masks(picks)}

    def _masks(self, picks: SampleIndices) -> Batch:
        """Return which tokens are to be predicted, nothing if no corpus says so."""
        if not any(source.index.masks for source in self._sources):
            return {}
        mask = np.ones((len(picks.row), self._sources[0].index.sequence_length + 1), dtype=np.bool_)
        for index, shards in enumerate(self._sources):
            slots = np.flatnonzero(picks.corpus == index) if len(self._sources) > 1 else np.arange(len(picks.row))
            if isinstance(shards, TokenShards):  # streams have none
                mask[slots] = shards.read_masks(picks.row[slots])
        return {"mask": torch.from_numpy(mask)}

    def _tokens(self, picks: SampleIndices) -> torch.Tensor:
        if len(self._sources) == 1:
            return torch.from_numpy(self._sources[0].read(picks.row))
        shape = (len(picks.row), self._sources[0].index.sequence_length + 1)
        tokens = np.empty(shape, dtype=np.result_type(*(source.index.dtype for source in self._sources)))
        for index, shards in enumerate(self._sources):
            slots = np.flatnonzero(picks.corpus == index)
            shards.read_into(tokens, slots.tolist(), picks.row[slots])
        if tokens.max() >= self._smallest or (tokens.dtype.kind == "i" and tokens.min() < 0):
            for index, shards in enumerate(self._sources):  # whose rows they are, and whether its vocabulary is larger
                if isinstance(shards, TokenShards):  # streams look at their rows themselves
                    shards.read(picks.row[picks.corpus == index])
        return torch.from_numpy(tokens)
