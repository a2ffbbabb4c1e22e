"""A tokenizer of single bytes and some special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIALS = ("<|endoftext|>", "<s>", "x", "<|im_end|>", "<pad>")


def tokenizer_folder(folder: Path, eos: str, begin: str | None, **settings: str) -> Path:
    """Write a tokenizer of single bytes, whose texts begin with ``begin``, and return its folder."""
    vocab = {token: number for number, token in enumerate(
        [*SPECIALS, *(sign for sign in sorted(pre_tokenizers.ByteLevel.alphabet()) if sign != "x")]
    )}  # fmt: skip
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS if token != "x"])
    if begin:
        template = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, vocab[begin])])
        tokenizer.post_processor = template
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    given = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": "<s>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return folder
