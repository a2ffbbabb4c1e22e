"""Fixtures: a data module over two small corpora."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rewurst.datamodules import Corpus, TextDataModule


@pytest.fixture
def make(write_corpus: Callable[..., str]) -> Callable[..., TextDataModule]:
    prose, code, val = write_corpus("prose", 21), write_corpus("code", 30, seed=1), write_corpus("val", 10, seed=2)

    def build(**changes: Any) -> TextDataModule:
        corpora = {"prose": Corpus(prose, replay=True), "code": Corpus(code)}
        arguments: dict[str, Any] = {
            "dataset": "code",
            "corpora": corpora,
            "val": {"val": val},
            "sequence_length": 8,
            "micro_batch_size": 4,
            "global_batch_size": 8,
        }
        return TextDataModule(**{**arguments, **changes})

    return build
