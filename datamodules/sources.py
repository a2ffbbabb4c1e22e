"""Text that a run names instead of a prepared corpus: prepared once, before training, in a cache folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import UsageError

LONGEST_ROW = 1024  # tokens per row where nobody says how many; longer rows need more memory

# Preparation is built on the data modules, so that it is found by its name when a run asks for it.
PREPARATION = "rewurst.preparation.cached", "cached_corpus"


@dataclass(frozen=True)
class SourceOptions:
    """How sources are prepared.

    Args:
        tokenizer: Folder or hub name (default: the model's own).
        held_out: Share of the documents for validation.
        text_field: Field or column with the text.
        document_separator: What separates the documents of a plain text file.
        cache_dir: Folder of all prepared texts.
    """

    tokenizer: str | None
    held_out: float
    text_field: str
    document_separator: str | None
    cache_dir: str | None

    @property
    def folder(self) -> Path:
        """Folder of all prepared texts."""
        default = os.environ.get("REWURST_CORPORA_DIR") or "~/.cache/rewurst/corpora"
        return Path(self.cache_dir or default).expanduser()

    def tokenizer_of(self, module: Any, what: str) -> str:
        """Return the name of the tokenizer for sources and streams.

        Args:
            module: Module that is trained; it may name its tokenizer.
            what: What needs it, for messages.

        Raises:
            UsageError: No tokenizer is known.
        """
        tokenizer = self.tokenizer or getattr(module, "tokenizer_name", None)
        if not tokenizer:
            raise UsageError(
                f"{what}: the model comes without a tokenizer; set data.init_args.tokenizer to a folder or hub name"
            )
        return str(tokenizer)

    def prepare(self, source: str | Sequence[str], module: Any, sequence_length: int) -> Path:
        """Return the folder of the prepared text.

        Args:
            source: Files, folders, URLs or built-in corpora.
            module: Module that is trained; it may name its tokenizer.
            sequence_length: Number of predicted tokens per row.

        Raises:
            UsageError: No tokenizer is known, or the text cannot be prepared.
        """
        tokenizer = self.tokenizer_of(module, f"source {source}")
        module_name, function = PREPARATION
        cached_corpus = getattr(import_module(module_name), function)
        folder: Path = cached_corpus(
            [source] if isinstance(source, str) else list(source),
            tokenizer,
            sequence_length=sequence_length,
            held_out=self.held_out,
            text_field=self.text_field,
            document_separator=self.document_separator,
            cache=self.folder,
        )
        return folder


def row_length(module: Any) -> int:
    """Return the tokens per row for a model: as many as it can see, up to ``LONGEST_ROW``.

    Raises:
        UsageError: The model does not say how many it can see.
    """
    most = getattr(module, "context_length", None)
    if most is None:
        raise UsageError("sequence_length is not set, and the model does not say how many tokens it can see; set it")
    return min(int(most), LONGEST_ROW)
