"""Load a tokenizer from a folder, a file or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from . import UsageError
from .files import writing
from .hints import closest, did_you_mean

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)

CHAT_ENDS = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>", "<|endofturn|>",
     "[|endofturn|]", "<|END_OF_TURN_TOKEN|>", "<|user|>", "<|assistant|>", "<|end_of_role|>", "<|eom_id|>"}
)  # fmt: skip
"""End tokens of instruction-tuned models that end a turn of a chat, not a document."""

DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|end_of_document|>", "<|endofdoc|>", "<EOS_TOKEN>",
                 "<\uff5cend\u2581of\u2581sentence\uff5c>", "<eos>", "</s>", "[EOS]")  # fmt: skip
"""Tokens that end documents in the pre-training of base models, the likeliest first."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as encoding needs it, and the files of its copy next to the shards.

    Attributes:
        json: Contents of ``tokenizer.json``.
        end_token: Number of the token after each document.
        vocab_size: One more than the highest token.
        files: Contents by file name.
        begin_tokens: Tokens before each document, which the tokenizer itself adds to a text: none, or a BOS.
        end_text: The end token as text.
    """

    json: str
    end_token: int
    vocab_size: int
    files: dict[str, bytes]
    begin_tokens: tuple[int, ...] = ()
    end_text: str = ""

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


def load_tokenizer(name: str, end_token: str | None = None) -> TokenizerFiles:
    """Read a tokenizer from a folder, or by its hub name through transformers.

    Args:
        name: Folder with ``tokenizer.json``, or with files that transformers makes one of (``tokenizer.model``, or
            ``vocab.json`` and ``merges.txt``), or a hub name.
        end_token: Token after each document (default: the tokenizer's end token, but the token that ends documents if
            that one ends the turns of a chat).

    Raises:
        UsageError: There is no tokenizer, it has no fast version, or it does not name its end token.
    """
    if Path(name).is_dir():
        return _from_folder(Path(name), end_token=end_token)
    if Path(name).exists():
        raise UsageError(f"tokenizer {name} is a file, expected the folder that contains tokenizer.json")
    if _is_local(name):
        raise UsageError(f"tokenizer {name}: no such folder{did_you_mean(Path(name))}")
    return _from_transformers(name, name, end_token)


def _is_local(name: str) -> bool:
    """Tell a path from a hub name, which has at most one slash and whose first part is not a local folder."""
    first, *rest = Path(name).parts
    return (
        first in (os.sep, ".", "..", "~")
        or name.startswith(".")
        or len(rest) > 1
        or (bool(rest) and os.path.isdir(first))
    )


def _from_transformers(source: str, name: str, end_token: str | None) -> TokenizerFiles:
    """Read what ``AutoTokenizer`` makes of a hub name, or of a folder without ``tokenizer.json``."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # converters raise whatever their parsers do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        near = did_you_mean(Path(name))
        what = "cannot be read" if Path(source).is_dir() else "no such folder, and the hub gave none"
        raise UsageError(f"tokenizer {name}: {what} ({reason}){near}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(f"tokenizer {name} is a {type(tokenizer).__name__}, expected one with a fast version")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _from_folder(Path(folder), name, end_token)


def _from_folder(folder: Path, name: str = "", end_token: str | None = None) -> TokenizerFiles:
    name = name or str(folder)
    files = {file: (folder / file).read_bytes() for file in TOKENIZER_FILES if (folder / file).is_file()}
    if "tokenizer.json" not in files:
        if "tokenizer.model" in files or "vocab.json" in files:
            return _from_transformers(str(folder), name, end_token)
        raise UsageError(
            f"tokenizer {name}: no tokenizer.json; `rewurst prepare tokenizer SOURCE... --out DIR` makes one"
        )
    content = files["tokenizer.json"].decode("utf-8", "replace")
    tokenizer = parse_tokenizer(content, f"tokenizer {name}")
    settings = _settings(files, name)
    end = _end_token(settings, tokenizer, name, end_token)
    number = tokenizer.token_to_id(end)
    if number is None:
        raise UsageError(f"tokenizer {name}: end token {end!r} is not in its vocabulary")
    size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    # transformers leaves add_bos_token of the settings out if there is a tokenizer.json: its post-processor decides
    begin = prefix(tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids)
    return TokenizerFiles(content, number, size, files, begin, end)


def parse_tokenizer(content: str, where: str) -> Tokenizer:
    """Return the tokenizer of a ``tokenizer.json``.

    Raises:
        UsageError: It cannot be read; begins with ``where``.
    """
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise UsageError(f"{where}: tokenizer.json cannot be read ({error})") from None


def _settings(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """Return the settings of ``tokenizer_config.json``, completed by ``special_tokens_map.json``."""
    found: dict[str, Any] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings = json.loads(files.get(file, b"{}"))
        except ValueError as error:
            raise UsageError(f"tokenizer {name}: {file} is not valid JSON ({error})") from None
        if isinstance(settings, dict):
            found = {key: value for key, value in settings.items() if value is not None} | found
    return found


def _token(settings: dict[str, Any], key: str) -> str | None:
    token = settings.get(key)
    if isinstance(token, dict):  # older versions of transformers write the whole AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else None


def _end_token(settings: dict[str, Any], tokenizer: Tokenizer, name: str, given: str | None) -> str:
    if given is not None:
        if tokenizer.token_to_id(given) is None:
            near = closest(given, [token.content for token in tokenizer.get_added_tokens_decoder().values()])
            raise UsageError(f"tokenizer {name}: end_token {given!r} is not in its vocabulary{near}")
        return given
    end = _token(settings, "eos_token")
    if end is None:
        raise UsageError(f"tokenizer {name}: no end token; set eos_token in its tokenizer_config.json")
    if end in CHAT_ENDS:
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        end = next((token for token in DOCUMENT_ENDS if token in special), end)
    return end


def prefix(whole: Sequence[int], text: Sequence[int]) -> tuple[int, ...]:
    """Return what stands before a text's tokens in a sequence that contains them."""
    for begin in range(len(whole) - len(text) + 1):
        if list(whole[begin : begin + len(text)]) == list(text):
            return tuple(whole[:begin])
    return ()
