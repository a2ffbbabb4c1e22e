"""Captions in files: decoding of text without guessing, and several captions per image."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any

from .geometry import uniform
from .header import DecodeError

# Longer marks come first, because UTF-32's begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_FOREIGN = re.compile("[\0\x1b]")  # UTF-16 without a mark, and the escape sequences of ISO-2022, are valid UTF-8


def text_of(content: bytes) -> str:
    """Decode text that is UTF-8 or has a byte order mark.

    Raises:
        DecodeError: The text is neither; other encodings are not guessed.
    """
    mark = next((mark for mark in _MARKS if content.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "utf-8")
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise DecodeError(
            f"byte {at} (0x{content[at]:02x}) is not valid {encoding.upper()}; convert it to UTF-8"
        ) from None
    if found := _FOREIGN.search(text):
        raise DecodeError(f"it has the character U+{ord(found[0]):04X}, so it is not UTF-8 text; convert it to UTF-8")
    return text


def captions_in(value: Any) -> list[str]:
    """Return the captions in a JSON or table value, a text or a list of texts, each as one line.

    Raises:
        DecodeError: A text has half a surrogate pair, which no encoding can represent.
    """
    texts = value if isinstance(value, list) else [value]
    captions = [" ".join(text.strip().splitlines()) for text in texts if isinstance(text, str) and text.strip()]
    for caption in captions:
        if not caption.isascii() and any("\ud800" <= character <= "\udfff" for character in caption):
            raise DecodeError(f"its caption {caption!r:.60} has half a surrogate pair")
    return captions


def captions_in_text(content: bytes) -> list[str]:
    """Return the captions in a text file: its lines, empty ones left out.

    Raises:
        DecodeError: The file is not text.
    """
    return captions_in(text_of(content).splitlines())


def choose(captions: Sequence[str], seed: int | None) -> int:
    """Return the index of a sample's caption: drawn by its seed, or the first without a seed."""
    if seed is None or len(captions) < 2:
        return 0
    return int(uniform(seed, "which caption", 1)[0] * len(captions))
