"""Cut documents into texts of bounded size that a worker encodes, and decide which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ... import UsageError
from ..sources.documents import Piece
from .seams import Encode, Joint, split

SECTION_CHARS = 2**21  # of a long document; each has the tokens that it has within the document
MOST_CHARS = 2**25


class Text(NamedTuple):
    """Part of a document.

    Attributes:
        stream: Number of the stream that it belongs to.
        text: Characters, those that overlap with the parts before and after it included.
        ends_document: Whether it is the document's last part.
        head: Overlap with the part before it.
        tail: Overlap with the part after it.
        prompt: Beginning of the document that is not to be predicted, before its first part.
    """

    stream: int
    text: str
    ends_document: bool
    head: Joint = Joint()
    tail: Joint = Joint()
    prompt: str = ""


def is_held_out(beginning: str, share: float) -> bool:
    """Return whether a document with this beginning (its first piece) is for validation."""
    digest = hashlib.blake2b(beginning.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def sections(pieces: Iterable[Piece], held_out: float, encode: Encode) -> Iterator[Text]:
    """Yield documents, long ones in parts; stream 1 has those that are held out, stream 0 all others.

    Args:
        pieces: Pieces of documents, in their order.
        held_out: Share of the documents that is held out.
        encode: Function that encodes a text at once.

    Raises:
        UsageError: A long document has no place where it can be split for this tokenizer.
    """
    stream, parts, size, head, prompt = 0, list[str](), 0, Joint(), ""
    limit = SECTION_CHARS
    for piece in pieces:
        if not parts:
            stream, prompt = int(is_held_out(piece.prompt + piece.text, held_out)), piece.prompt
        parts.append(piece.text)
        size += len(piece.text)
        if piece.corrupt and not head.chars:  # nothing of it has been written
            parts, size, limit = [], 0, SECTION_CHARS
        elif piece.ends_document:
            yield Text(stream, "".join(parts), True, head, prompt="" if head.chars else prompt)
            parts, size, head, limit = [], 0, Joint(), SECTION_CHARS
        elif size >= limit + limit // 4:
            text = "".join(parts)
            found = split(text, encode, limit)
            if found is None:
                limit = _longer(limit, text)
                parts = [text]
                continue
            yield Text(stream, text[: found.end], False, head, found.tail, "" if head.chars else prompt)
            parts, head, limit = [text[found.begin :]], found.head, SECTION_CHARS
            size = len(parts[0])


def _longer(limit: int, text: str) -> int:
    if limit >= MOST_CHARS:
        raise UsageError(
            f"a document has {len(text)} characters in which this tokenizer has no place to split, such as "
            f"{text[limit : limit + 40]!r}; split it into several documents or leave it out"
        )
    return 2 * limit
