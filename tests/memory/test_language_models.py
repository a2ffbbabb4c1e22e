"""Plans of language models with adapters and masks of documents."""

from __future__ import annotations

from typing import Any

import pytest

from rewurst import UsageError
from rewurst.memory.module import measure

LLAMA = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip
DATA = {"dataset": "a", "corpora": {"a": {"path": "missing"}}, "val": {}, "sequence_length": 8, "micro_batch_size": 2,
        "global_batch_size": 2}  # fmt: skip


def plan(**arguments: Any) -> Any:
    config = {
        "model": {"class_path": "rewurst.modules.CausalLM", "init_args": {"model": LLAMA, **arguments}},
        "data": {"class_path": "rewurst.datamodules.TextDataModule", "init_args": DATA},
    }
    return measure(config, 2, "32-true", on_cpu=True)


def test_masks_of_documents() -> None:
    assert plan(document_masks=True).step.forward > 0


def test_adapters_cannot_be_planned() -> None:
    with pytest.raises(UsageError, match="lora cannot be planned, because peft needs weights: plan without it"):
        plan(lora={"r": 4})
