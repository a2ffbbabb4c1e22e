"""Data modules that stream exact global batches from WebDataset shards.

Classes are imported when they are asked for: the processes that tokenize import this package and need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .text import Corpus, TextDataModule

__all__ = ["Corpus", "TextDataModule"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import text

        return getattr(text, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
