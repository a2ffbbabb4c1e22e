"""The kinds of corpora that there are."""

from __future__ import annotations

from .. import UsageError
from .kind import Kind
from .tar_scan import Sample
from .token_kind import Tokens

__all__ = ["KINDS", "Kind", "kind_of"]

KINDS: dict[str, type[Kind]] = {"text": Tokens}
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def kind_of(sample: Sample, where: str) -> str:
    """The kind of corpus that a first sample belongs to."""
    extensions = [member.extension.rsplit(".", 1)[-1] for member in sample.members]
    if any(extension in IMAGE_EXTENSIONS for extension in extensions):
        return "images"
    if "npy" in extensions:
        return "text"
    raise UsageError(
        f"{where}: its first sample {sample.key!r} holds {', '.join(extensions)}; expected .npy of token rows, or an "
        f"image ({', '.join(IMAGE_EXTENSIONS)}) with its caption"
    )
