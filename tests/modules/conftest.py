"""Fixtures: a data module for language models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rewurst.datamodules import Corpus, TextDataModule


@pytest.fixture
def data(write_corpus: Callable[..., str]) -> Callable[..., TextDataModule]:
    folders = {name: write_corpus(name, 23 + 4 * seed, seed) for seed, name in enumerate(("prose", "code"))}

    def build(**changes: Any) -> TextDataModule:
        arguments: dict[str, Any] = {
            "dataset": "prose",
            "corpora": {"prose": Corpus(folders["prose"])},
            "val": folders,
            "sequence_length": 8,
            "micro_batch_size": 2,
            "global_batch_size": 4,
        }
        return TextDataModule(**{**arguments, **changes})

    return build
