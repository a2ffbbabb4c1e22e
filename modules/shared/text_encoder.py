"""Text encoders that are trained with Stage C: built from a config, kept in checkpoints as plain values, read back."""

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
    """Build a CLIP text model with fresh weights around a tokenizer.

    Args:
        settings: Those of ``transformers.CLIPTextConfig``, without the numbers of tokens, which are the tokenizer's,
            and ``tokenizer``, a folder that ``rewurst prepare tokenizer`` made. ``max_position_embeddings`` states
            are what the stages see of a text.

    Raises:
        UsageError: An unknown setting, no tokenizer.
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
    # CLIP's deviation of 0.02 is gone after some ten of AdamW's first steps: words would be told apart much later.
    words: Any = model.get_input_embeddings()
    torch.nn.init.normal_(words.weight)
    return TextEncoder(model, tokenizer)


def _framed_tokenizer(folder: str, length: int) -> Any:
    """Load a tokenizer so that texts begin and end with its end token, as CLIP's do, and are padded with it.

    Without them an empty text would have no token that attention may look at.
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
    """Return what a checkpoint says of an encoder whose weights it holds under ``attribute``: texts and numbers."""
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    config = json.loads(encoder.model.config.to_json_string(use_diff=False))
    return {"attribute": attribute, "config": config, "tokenizer": files}


def checkpoint_text_encoder(path: str | Path) -> TextEncoder | str | None:
    """Return the text encoder that a checkpoint holds, or the name of the one it was trained with, if it says any.

    Raises:
        UsageError: The file cannot be read, or what it holds does not belong together.
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
