"""The kinds of corpora that there are."""

from __future__ import annotations

from ... import UsageError
from ...datamodules.corpora.tar import Sample
from ...datamodules.imaging.facts import IMAGE_SUFFIXES
from .base import Kind
from .images import Images, has_image
from .latents import Latents
from .tokens import Tokens

__all__ = ["KINDS", "Kind", "kind_of"]

KINDS: dict[str, type[Kind]] = {"text": Tokens, "images": Images, "latents": Latents}


def kind_of(sample: Sample, where: str) -> str:
    """Return the kind of corpus that a first sample belongs to."""
    extensions = [member.extension for member in sample.members]
    if has_image(extensions):
        return "images"
    if "z.npy" in extensions:
        return "latents"
    if any(extension.endswith("npy") for extension in extensions):
        return "text"
    raise UsageError(
        f"{where}: its first sample {sample.key!r} holds {', '.join(extensions)}; expected .npy of token rows, or an "
        f"image ({', '.join(IMAGE_SUFFIXES)}) with its caption; other names with --image_member and --caption_member"
    )
