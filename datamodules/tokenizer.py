"""Tokenizers: byte-level BPE trained on sources, and any fast tokenizer of a folder or the hub read for encoding."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from .. import UsageError
from ..hints import did_you_mean
from .corpus_index import write_atomically, writing
from .folders import TOKENIZER_FILES, TOKENIZER_LAYOUT, make_folder
from .sources import Skipped, expand, read

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # all bytes and the end token


@dataclass(frozen=True)
class TokenizerFiles:
    """What encoding needs of a tokenizer, and what its copy beside the shards consists of.

    Attributes:
        json: Contents of ``tokenizer.json``.
        end_token: Number of the end token.
        vocab_size: One more than the highest token.
        files: Contents by file name.
    """

    json: str
    end_token: int
    vocab_size: int
    files: dict[str, bytes]

    @property
    def sha256(self) -> str:
        """SHA-256 of ``tokenizer.json``."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files into ``folder``."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)


def train_tokenizer(
    sources: Sequence[str],
    vocab_size: int,
    out: Path,
    *,
    text_field: str = "text",
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Train a byte-level BPE and save it so that ``AutoTokenizer.from_pretrained(out)`` loads it.

    Token 0 is ``<|endoftext|>`` (end, beginning and unknown token); all 256 bytes are tokens, so that any text can be
    encoded and decoded again. The same sources give the same bytes.

    Returns:
        The vocabulary reached: less than ``vocab_size`` where the text has too few pairs to merge.

    Raises:
        UsageError: A vocabulary under 257, sources that cannot be read, an ``out`` that is not empty.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocab_size is {vocab_size}, expected {SMALLEST_VOCABULARY} or more: 256 bytes and the end token"
        )
    skipped = Skipped()
    files = expand(sources, skipped)
    make_folder(Path(out), TOKENIZER_LAYOUT, overwrite)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with tqdm(unit=" characters", unit_scale=True, desc="tokenizer", disable=not progress, file=sys.stderr) as bar:

        def texts() -> Iterator[str]:
            for file in files:
                for piece in read(file, text_field, skipped):
                    bar.update(len(piece.text))
                    yield piece.text

        tokenizer.train_from_iterator(texts(), trainer)
    _save(tokenizer, Path(out))
    reached = int(tokenizer.get_vocab_size())
    few = f" ({vocab_size} asked for; the text has no more pairs to merge)" if reached < vocab_size else ""
    print("; ".join(filter(None, [f"{out}: {reached} tokens{few}", skipped.report()])), file=sys.stderr)
    return reached


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "bos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # decoding gives back what was encoded
    }
    with writing(folder):
        write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")


def load_tokenizer(name: str) -> TokenizerFiles:
    """Read a tokenizer from a folder with a ``tokenizer.json``, or by its hub name through transformers.

    Raises:
        UsageError: Nothing there, no fast tokenizer, or none that says which its end token is.
    """
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if Path(name).exists():
        raise UsageError(f"tokenizer {name} is a file, expected the folder that holds tokenizer.json")
    if _is_local(name):
        raise UsageError(f"tokenizer {name}: no such folder{did_you_mean(Path(name))}")
    return _from_hub(name)


def _is_local(name: str) -> bool:
    """Hub names have one slash at most; a name whose first part is a folder here is meant to lie in it."""
    first, *rest = Path(name).parts
    return (
        first in (os.sep, ".", "..", "~")
        or name.startswith(".")
        or len(rest) > 1
        or (bool(rest) and os.path.isdir(first))
    )


def _from_hub(name: str) -> TokenizerFiles:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        near = did_you_mean(Path(name))
        raise UsageError(f"tokenizer {name}: no such folder, and the hub gave none ({reason}){near}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"tokenizer {name} is a {type(tokenizer).__name__}, expected one with a fast version")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _from_folder(Path(folder), name)


def _from_folder(folder: Path, name: str = "") -> TokenizerFiles:
    name = name or str(folder)
    files = {file: (folder / file).read_bytes() for file in TOKENIZER_FILES if (folder / file).is_file()}
    if "tokenizer.json" not in files:
        raise UsageError(
            f"tokenizer {name}: no tokenizer.json; `rewurst prepare tokenizer SOURCE... --out DIR` makes one"
        )
    content = files["tokenizer.json"].decode("utf-8", "replace")
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UsageError(f"tokenizer {name}: tokenizer.json cannot be read ({error})") from None
    end = _end_token(files, name)
    number = tokenizer.token_to_id(end)
    if number is None:
        raise UsageError(f"tokenizer {name}: end token {end!r} is not in its vocabulary")
    return TokenizerFiles(content, number, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values()), files)


def _end_token(files: dict[str, bytes], name: str) -> str:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings = json.loads(files.get(file, b"{}"))
        except ValueError as error:
            raise UsageError(f"tokenizer {name}: {file} is not valid JSON ({error})") from None
        token = settings.get("eos_token") if isinstance(settings, dict) else None
        if isinstance(token, dict):  # older versions of transformers write the whole AddedToken
            token = token.get("content")
        if isinstance(token, str):
            return token
    raise UsageError(f"tokenizer {name}: no end token; set eos_token in its tokenizer_config.json")
