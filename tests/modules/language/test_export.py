"""An export is consistent: its configs and tokenizer name the tokens with which the data was prepared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import tokenizer_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer

from rewurst import UsageError
from rewurst.modules import CausalLM
from rewurst.modules.language.generation import begin_tokens_of, continuations, generate_text, load_auto_tokenizer
from rewurst.modules.language.hugging_face import export_hugging_face

CONFIG = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip


def checkpoint(folder: Path, tokenizer: Path, data: dict[str, Any], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    module = CausalLM({**CONFIG, **changes})
    content = {"state_dict": module.state_dict(), "model_config": module.model.config.to_dict()}  # type: ignore
    path = folder / "last.ckpt"
    torch.save({**content, "TextDataModule": {"tokenizer": str(tokenizer), **data}}, path)
    return path


@pytest.mark.parametrize(
    ("eos", "template", "data", "ends", "begins"),
    [
        ("<|endoftext|>", None, {}, 0, ()),
        ("<|endoftext|>", "<s>", {}, 0, (1,)),
        ("<|endoftext|>", None, {"end_token": 0, "begin_tokens": []}, 0, ()),
        ("<|im_end|>", None, {"end_token": 0, "begin_tokens": []}, 0, ()),
        ("<|im_end|>", "<s>", {"end_token": 0, "begin_tokens": [1]}, 0, (1,)),
        ("<|im_end|>", "<s>", {"end_token": 3, "begin_tokens": []}, 3, ()),
    ],
)
@pytest.mark.parametrize("pads", [False, True])
def test_configs_and_tokenizer_agree(
    tmp_path: Path, eos: str, template: str | None, data: dict[str, Any], ends: int, begins: tuple[int, ...], pads: bool
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    padding = {"pad_token": "<pad>"} if pads else {}
    folder = tokenizer_folder(tmp_path / "tokenizer", eos, template, **padding)
    path = checkpoint(tmp_path / "run", folder, data)
    export_hugging_face(path, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for config in (model.config, model.generation_config, GenerationConfig.from_pretrained(tmp_path / "hf")):
        assert config.eos_token_id == tokenizer.eos_token_id == ends
        assert config.bos_token_id == tokenizer.bos_token_id == 1
        assert config.pad_token_id == tokenizer.pad_token_id == (4 if pads else None)
    assert begin_tokens_of(tokenizer) == begins
    assert tokenizer("abc")["input_ids"][: len(begins)] == list(begins)
    assert len(tokenizer("abc")["input_ids"]) == len(begins) + 3
    assert tokenizer.decode(tokenizer("a <b> c")["input_ids"], skip_special_tokens=True) == "a <b> c"


def test_generation_stops_at_the_token_that_ended_the_documents(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "<|im_end|>", None)
    path = checkpoint(tmp_path / "run", folder, {"end_token": 0, "begin_tokens": []})
    content = torch.load(path, weights_only=True)
    for name, tensor in content["state_dict"].items():
        if name.endswith("lm_head.weight"):
            tensor.zero_()
    torch.save(content, path)
    export_hugging_face(path, tmp_path / "hf")
    # All logits are equal, so the likeliest is the first token, which ended the documents.
    assert generate_text(str(tmp_path / "hf"), "ab", max_new_tokens=9, temperature=0) == "ab"


@pytest.mark.parametrize("begin_tokens", [None, [], [1]])
def test_prompts_begin_as_documents_do(tmp_path: Path, begin_tokens: list[int] | None) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "<|endoftext|>", "<s>")
    model, seen = CausalLM(CONFIG).model, []

    def generate(input_ids: torch.Tensor, eos_token_id: int, **_: Any) -> torch.Tensor:
        seen.append((input_ids[0].tolist(), eos_token_id))
        return input_ids

    model.generate = generate  # type: ignore[assignment]
    continuations(model, str(folder), ["a", ""], 3, 0, end_token=3, begin_tokens=begin_tokens)
    begin = [1] if begin_tokens is None else begin_tokens
    token = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("a")
    assert seen == [([*begin, token], 3), (begin or [1], 3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_requested_precision(tmp_path: Path, dtype: str) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "<|endoftext|>", None)
    path = checkpoint(tmp_path / "run", folder, {})
    export_hugging_face(path, tmp_path / "hf", dtype=dtype)  # type: ignore[arg-type]
    state = load_file(tmp_path / "hf" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == dtype
    assert {parameter.dtype for parameter in CausalLM(str(tmp_path / "hf")).parameters()} == {torch.float32}


def test_the_newest_checkpoint_of_a_run(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "<|endoftext|>", None)
    old = checkpoint(tmp_path / "run" / "version_0" / "checkpoints", folder, {})
    new = checkpoint(tmp_path / "run" / "version_1" / "checkpoints", folder, {}, hidden_size=32)
    os.utime(old, (1, 1))
    export_hugging_face(Path(f"auto:{tmp_path / 'run'}"), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == 32
    os.utime(new, (0, 0))
    export_hugging_face(Path(f"auto:{tmp_path / 'run'}"), tmp_path / "hf", overwrite=True)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["hidden_size"] == 16
    with pytest.raises(UsageError, match=r"auto:\S+nothing: there is no whole checkpoint under \S+nothing"):
        export_hugging_face(Path(f"auto:{tmp_path / 'nothing'}"), tmp_path / "other")
    with pytest.raises(UsageError, match=r"run is a folder: give a .ckpt file, or auto:\S+run for its newest"):
        export_hugging_face(tmp_path / "run", tmp_path / "other")


def test_a_tokenizer_that_transformers_reads_differently(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "<|endoftext|>", None)
    path = checkpoint(tmp_path / "run", folder, {}, model_type="qwen2", num_key_value_heads=2)
    with pytest.warns(UserWarning, match="reads the tokenizer of this model as a Qwen2Tokenizer, which cuts texts"):
        export_hugging_face(path, tmp_path / "hf")
    text = "1,000,000 CamelCase"
    assert load_auto_tokenizer(tmp_path / "hf")(text) == load_auto_tokenizer(folder)(text)


def test_a_checkpoint_whose_config_holds_keys_of_other_programs(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "tokenizer", "<|endoftext|>", None)
    path = checkpoint(tmp_path / "run", folder, {})
    content = torch.load(path, weights_only=True)
    content["model_config"] |= {"is_llama_config": True, "_model_name_or_path": "x", "hiden_size": 7, "n_ctx": 3}
    torch.save(content, path)
    export_hugging_face(path, tmp_path / "hf")
    assert CausalLM(str(tmp_path / "hf")).model.config.hidden_size == 16  # type: ignore[union-attr]
