"""Load a tokenizer from a folder, a file or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from . import UsageError
from .files import writing
from .hints import did_you_mean

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as encoding needs it, and the files of its copy next to the shards.

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
        """Return the SHA-256 of ``tokenizer.json``."""
        return hashlib.sha256(self.files["tokenizer.json"]).hexdigest()

    def save(self, folder: Path) -> None:
        """Write the files into ``folder``."""
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)


def load_tokenizer(name: str) -> TokenizerFiles:
    """Read a tokenizer from a folder with a ``tokenizer.json``, or by its hub name through transformers.

    Raises:
        UsageError: There is no tokenizer, it has no fast version, or it does not name its end token.
    """
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if Path(name).exists():
        raise UsageError(f"tokenizer {name} is a file, expected the folder that contains tokenizer.json")
    if _is_local(name):
        raise UsageError(f"tokenizer {name}: no such folder{did_you_mean(Path(name))}")
    return _from_hub(name)


def _is_local(name: str) -> bool:
    """Tell a path from a hub name, which has at most one slash and whose first part is not a local folder."""
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
