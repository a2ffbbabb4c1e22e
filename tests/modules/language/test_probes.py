"""Document masks and causality are judged by the models' behavior, not by their settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rewurst import UsageError
from rewurst.modules import CausalLM

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
         "eos_token_id": 2}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
CROSSING: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "num_experts": 2},
    "recurrent_gemma": {"lru_width": 16, "num_hidden_layers": 3, "head_dim": 4},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                   "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 8,
                   "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "head_dim": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "mamba": {"state_size": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 4, "sliding_window": 4},  # its masks ignore positions
}  # fmt: skip
APART: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32, "dropout": 0.0},
    "gemma2": {"head_dim": 4, "sliding_window": 3}, "gemma3_text": {"head_dim": 4, "sliding_window": 3},
    "mixtral": {"num_local_experts": 4},
    "cohere2": {"sliding_window": 3}, "phi3": {}, "gptj": {"rotary_dim": 4, "resid_pdrop": 0.0},
}  # fmt: skip


def _config(kind: str, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    known = {*CONFIG_MAPPING[kind]().to_dict(), *CONFIG_MAPPING[kind].attribute_map}
    return {name: value for name, value in SMALL.items() if name in known} | {"model_type": kind, **configs[kind]}


@pytest.mark.parametrize("kind", CROSSING)
def test_a_state_that_crosses_documents_is_refused(kind: str) -> None:
    config = _config(kind, CROSSING)
    CausalLM(config)
    with pytest.raises(UsageError, match=r"^document_masks: [^\n]+$"):
        CausalLM(config, document_masks=True)


def test_attention_that_ignores_documents_is_refused() -> None:
    config = _config("opt", APART)
    with pytest.raises(UsageError, match="OPTForCausalLM with eager attention does not keep the documents"):
        CausalLM(config, document_masks=True, attn_implementation="eager")


@pytest.mark.parametrize("kind", APART)
@pytest.mark.parametrize("train", [False, True])
def test_accepted_models_keep_documents_apart(kind: str, train: bool) -> None:
    torch.manual_seed(0)
    module = CausalLM(_config(kind, APART), document_masks=True).train(train)
    ids = torch.randint(3, 64, (2, 20))
    ids[:, 7] = ids[:, 15] = 2
    others = ids.clone()
    others[:, :7] = torch.randint(3, 64, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(
            module.token_losses(ids)[:, 7:], module.token_losses(others)[:, 7:], rtol=1e-4, atol=1e-5
        )


def test_probing_keeps_modes_gradients_and_random_state() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    module = CausalLM({**SMALL, "model_type": "llama"}, document_masks=True)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert module.model.training
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(kind: str) -> None:
    config = {**SMALL, "model_type": kind, "max_position_embeddings": 40, "embedding_size": 16}
    config = {name: value for name, value in config.items() if name != "num_key_value_heads"}
    if kind != "electra":
        del config["embedding_size"]
    with pytest.raises(UsageError, match="its tokens see the tokens after them"):
        CausalLM(config)
    CausalLM({**config, "is_decoder": True})
