"""Text encoders trained with Stage C: built from a config, stored in checkpoints as plain values, and restored."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ... import UsageError
from ...hints import closest
from ..networks import TextEncoder
from ..networks.weight_files import is_one_file, read_file


def fresh_text_encoder(settings: Mapping[str, Any]) -> TextEncoder:
    """Build a CLIP text model with new weights for a tokenizer.

    Args:
        settings: Settings of ``transformers.CLIPTextConfig``, except those that follow from the tokenizer, and
            ``tokenizer``, a folder made by ``rewurst prepare tokenizer``. The stages see a text as
            ``max_position_embeddings`` states.

    Raises:
        UsageError: A setting is unknown, or there is no tokenizer.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = dict(settings)
    folder = settings.pop("tokenizer", None)
    if folder is None:
        raise UsageError("text_encoder has no tokenizer: give a folder that `rewurst prepare tokenizer` made")
    known = CLIPTextConfig().to_dict()
    for name in settings:
        if name not in known:
            raise UsageError(f"text_encoder's {name} is unknown to CLIPTextConfig{closest(name, known)}")
    tokenizer = _framed_tokenizer(str(folder), settings.get("max_position_embeddings", 77))
    end = tokenizer.eos_token_id
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    model = CLIPTextModel(CLIPTextConfig(**settings, **tokens))
    # AdamW's first ten or so steps drown CLIP's deviation of 0.02, so words would become distinct much later.
    words: Any = model.get_input_embeddings()
    torch.nn.init.normal_(words.weight)
    return TextEncoder(model, tokenizer)


def _framed_tokenizer(folder: str, length: int) -> Any:
    """Load a tokenizer whose texts begin and end with its end token, as CLIP's do, and are padded with it.

    Without these tokens an empty text would have nothing to attend to.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from ...tokenizer_files import load_tokenizer

    files = load_tokenizer(folder)
    tokenizer: Any = Tokenizer.from_str(files.json)
    end = tokenizer.id_to_token(files.end_token)
    frame = TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, files.end_token)])
    tokenizer.post_processor = frame
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), end)
    fast: Any = PreTrainedTokenizerFast  # transformers leaves its constructor untyped
    return fast(tokenizer_object=tokenizer, model_max_length=length, **special)


def text_encoder_state(encoder: TextEncoder, attribute: str) -> dict[str, Any]:
    """Return a checkpoint's description, in plain values, of an encoder with weights under ``attribute``."""
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    config = json.loads(encoder.model.config.to_json_string(use_diff=False))
    return {"attribute": attribute, "config": config, "tokenizer": files}


def checkpoint_text_encoder(path: str | Path) -> TextEncoder | str | None:
    """Return a checkpoint's text encoder, or the name of the one it was trained with, or None.

    Raises:
        UsageError: The file cannot be read, or its text encoder is broken.
    """
    if not is_one_file(path):
        return None
    content = read_file(path)
    entry = content.get("text_encoder")
    if not isinstance(entry, dict):
        return entry if isinstance(entry, str) else None
    return _restored(entry, content["state_dict"], str(path))


def _restored(entry: Mapping[str, Any], state: Mapping[str, Any], where: str) -> TextEncoder:
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    model = CLIPTextModel(CLIPTextConfig(**entry["config"]))
    prefix = f"{entry['attribute']}.model."
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise UsageError(f"{where}: its text encoder is broken ({str(error).splitlines()[-1].strip()})") from None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in entry["tokenizer"].items():
            (Path(folder) / Path(name).name).write_text(content, encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return TextEncoder(model, tokenizer)
