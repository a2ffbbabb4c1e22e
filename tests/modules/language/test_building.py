"""Models from folders, configs and checkpoints are complete, in float32 and tied like their files, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewurst import UsageError
from rewurst.modules import CausalLM
from rewurst.modules.language.building import build, rebuild
from rewurst.modules.language.configs import config_from_settings, config_from_stored

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}  # fmt: skip
LLAMA = {**SMALL, "model_type": "llama"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_ctx": 32, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32,
             "vocab_size": 64, "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
             "attn_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
             "summary_proj_to_labels": True,
             "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
             "bos_token_id": 1, "eos_token_id": 1},
    "smollm2": {**LLAMA, "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "rope_interleaved": False,
                "rope_theta": 100000, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "bfloat16",
                "tie_word_embeddings": True, "_model_name_or_path": "x", "unk_token_id": 0,
                "transformers.js_config": {"kv_cache_dtype": {}}, "transformers_version": "4.40.1"},
    "qwen2.5": {**SMALL, "model_type": "qwen2", "use_mrope": False, "use_sliding_window": False, "sliding_window": 32,
                "max_window_layers": 2, "rope_theta": 1e6, "torch_dtype": "bfloat16", "tie_word_embeddings": True},
    "qwen3_moe": {**SMALL, "model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
                  "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
                  "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "max_window_layers": 2},
    "mixtral": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
                "output_router_logits": False, "router_aux_loss_coef": 0.02, "sliding_window": None,
                "rope_theta": 1e6, "torch_dtype": "bfloat16"},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    build(LLAMA).save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    return tmp_path / "hf"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_built_and_rebuilt(name: str) -> None:
    built = build(PUBLISHED[name])
    again = rebuild(built.config.to_dict() | PUBLISHED[name])  # type: ignore[union-attr,operator]
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (built, again)]
    assert shapes[0] == shapes[1]
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}


def test_settings_of_version_4_are_used_not_only_accepted() -> None:
    config = config_from_settings({**LLAMA, "rope_theta": 12345.0, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_parameters["rope_theta"] == 12345.0
    assert config.rope_parameters["factor"] == 2.0
    assert config_from_settings(PUBLISHED["qwen3_moe"]).head_dim == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 8}, "model setting 'hiden_size' is unknown to llama; did you mean 'hidden_size'?"),
        ({"num_hidden_layer": 8}, "did you mean 'num_hidden_layers'?"),
        ({"num_attention_heads": 3}, "model settings of llama: "),
        ({"model_type": "t5"}, "model_type 't5' is not a causal language model"),
        ({"model_type": "vit"}, "model_type 'vit' is not a causal language model"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        build({**LLAMA, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_nothing_reads_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="llama does not read zzz; is the spelling right"):
        config_from_settings({**LLAMA, "zzz": 1})
    with pytest.warns(UserWarning, match="llama does not read hidden_activation; is the spelling right"):
        config_from_settings({**LLAMA, "architectures": ["LlamaForCausalLM"], "hidden_activation": "gelu"})
    assert config_from_stored({**LLAMA, "zzz": 1, "hiden_size": 3}).hidden_size == 16


def _change(folder: Path, change: Any) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _prefix(state: dict[str, Any]) -> None:
    for name in list(state):
        state[f"_orig_mod.{name}"] = state.pop(name)


def _drop_layer(state: dict[str, Any]) -> None:
    for name in [name for name in state if ".layers.1." in name]:
        del state[name]


def _reshape(state: dict[str, Any]) -> None:
    state["lm_head.weight"] = torch.zeros(70, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_prefix, r"missing lm_head.weight, .* and \d+ more, unexpected _orig_mod.lm_head.weight"),
        (_drop_layer, r"missing model.layers.1.\S+, .* and \d+ more, unexpected none"),
        (lambda state: state.update(extra=torch.zeros(1)), "missing none, unexpected extra"),
        (lambda state: state.pop("model.norm.weight"), "missing model.norm.weight, unexpected none"),
        (_reshape, r"lm_head.weight has shape \(70, 16\), its config.json makes that \(64, 16\)"),
    ],
)
def test_a_folder_with_other_weights_is_refused(
    folder: Path, change: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    _change(folder, change)
    for use in (lambda: build(str(folder)), lambda: CausalLM(LLAMA, init_from=str(folder))):
        with pytest.raises(UsageError, match=message) as error:
            use()
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_folder_of_another_kind_is_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(UsageError, match="could not be loaded: ") as error:
        build(str(folder))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["folder", "safetensors"])
def test_an_untied_source_unties_the_model(
    folder: Path, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build(str(folder))
    ids = torch.randint(64, (2, 9))
    init_from = folder if kind == "folder" else folder / "model.safetensors"
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        module = CausalLM({**LLAMA, "tie_word_embeddings": True}, init_from=str(init_from))
    assert any("head and embeddings are not tied" in record.message for record in caplog.records)
    assert torch.equal(module.model.eval()(ids).logits, source.eval()(ids).logits)
    config: Any = module.model.config
    assert config.tie_word_embeddings is False
    module.model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert torch.equal(build(str(tmp_path / "again")).eval()(ids).logits, source(ids).logits)


def test_a_folder_that_ties_what_its_file_does_not(folder: Path) -> None:
    expected = build(str(folder)).eval()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model, ids = build(str(folder)).eval(), torch.randint(64, (2, 9))
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    again = rebuild(model.config.to_dict())  # type: ignore[union-attr,operator]
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight  # type: ignore[operator]


def test_a_tied_source_fills_an_untied_model() -> None:
    tied = CausalLM({**LLAMA, "tie_word_embeddings": True})
    module = CausalLM(LLAMA)
    module.model.load_state_dict(tied.model.state_dict())
    ids = torch.randint(64, (2, 9))
    assert torch.equal(module.model.eval()(ids).logits, tied.model.eval()(ids).logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_to_train_are_float32(folder: Path, dtype: str) -> None:
    build(LLAMA).to(getattr(torch, dtype)).save_pretrained(folder)  # type: ignore[operator]
    for model in (str(folder), {**LLAMA, "torch_dtype": dtype}, {**LLAMA, "dtype": dtype}):
        assert {parameter.dtype for parameter in CausalLM(model).parameters()} == {torch.float32}


def test_a_model_that_was_quantized(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantized = {"quant_method": "gguf", "gguf_file": "a.gguf", "dequantize": False}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    module = CausalLM(str(folder))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    stored = torch.load(tmp_path / "a.ckpt", weights_only=True)["model_config"]
    assert stored.get("quantization_config") is None
    module.model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
