"""A small Llama, and the values that a run of a language model logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def rows_of(logger: Any, key: str) -> list[float]:
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    values = [dict(zip(header.split(","), line.split(","), strict=True))[key] for line in lines]
    return [float(value) for value in values if value]
