from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  # first imported under a captured stderr, its handler would keep that one
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

TINY = {
    "model_type": "gpt_neox",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    """A GPT-NeoX that trains a step in a few milliseconds."""
    return dict(TINY)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., str]:
    """Writes rows of random tokens as a corpus folder and returns its path."""
    from rewurst.datamodules.shards import TokenWriter

    def write(name: str, rows: int = 50, seed: int = 0, vocab_size: int = 64, sequence_length: int = 8) -> str:
        folder = tmp_path / "corpora" / name
        tokens = np.random.default_rng(seed).integers(vocab_size, size=rows * sequence_length + 1)
        with TokenWriter(
            folder,
            name=name,
            sequence_length=sequence_length,
            vocab_size=vocab_size,
            tokenizer_sha256="same",
            rows_per_sample=4,
            rows_per_shard=16,
        ) as writer:
            writer.append(tokens)
            writer.close()
        return str(folder)

    return write
