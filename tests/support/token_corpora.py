"""Corpora of tokens that processes of a pool read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rewurst.preparation.writing.token_writer import TokenWriter


def write_tokens(folder: Path, name: str, tokens: Any) -> None:
    """Write rows of 8 tokens out of 64, four per sample and 16 per shard, to ``folder/corpora/name``."""
    with TokenWriter(
        folder / "corpora" / name,
        name=name,
        sequence_length=8,
        vocab_size=64,
        tokenizer_sha256="same",
        rows_per_sample=4,
        rows_per_shard=16,
    ) as writer:
        writer.append(tokens)
        writer.close()
