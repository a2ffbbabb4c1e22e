"""Data modules that stream exact global batches from WebDataset shards.

Classes are imported when they are asked for: the processes that tokenize import this package and need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stream import Corpus
    from .text import TextDataModule

__all__ = ["Corpus", "TextDataModule"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import stream, text

        return getattr(text if name == "TextDataModule" else stream, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
